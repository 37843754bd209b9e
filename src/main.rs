use prism::*;
fn main(){ let d=device::Device::open("cpu",0).unwrap(); let a:Vec<String>=std::env::args().collect();
 let only:Vec<verify::Kind>=a[2..].iter().map(|s| <verify::Kind as clap::ValueEnum>::from_str(s,true).unwrap()).collect();
 let ok=verify::run(&d,std::path::Path::new(&a[1]),&only,|r|{ println!("{} {} {:?} {:?} {:.2}s",if r.passed(){"ok  "}else{"FAIL"},r.case,r.worst(),r.failure,r.seconds); for c in &r.checks{ if !c.passed() || std::env::var("ALL").is_ok(){println!("     {:?}",c)} }}).unwrap(); println!("{ok}"); }
