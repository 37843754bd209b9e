//! Processes that train one network together, each with its share of every batch.
//!
//! They meet over TCP: process 0 listens, the others call it. What they exchange there is added up by process 0 in the order of their ranks and sent back, so all of
//! them go on with the same bits. Gradients on GPUs are added by NCCL instead; its group is made known over the same connections.

use crate::device::{Cuda, Device};
use crate::tensor::OpError;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::ops::Range;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// How long processes wait for each other to appear.
const PATIENCE: Duration = Duration::from_secs(300);
/// The port of process 0 where nothing else is said: PyTorch's.
const PORT: u16 = 29500;

/// This process's place among those that train together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Which it is, from 0.
    pub rank: usize,
    /// How many there are.
    pub world: usize,
    /// Which it is of those on its machine: its GPU.
    pub local: usize,
    /// Where process 0 listens, `host:port`.
    pub address: String,
}

impl Place {
    /// From the variables that torchrun sets (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT; the port behind that where torchrun listens itself) or, with MASTER_ADDR, those of SLURM (SLURM_PROCID, SLURM_NTASKS,
    /// SLURM_LOCALID). None without them.
    pub fn from_variables(get: impl Fn(&str) -> Option<String>) -> Result<Option<Place>, String> {
        let number = |name: &str| -> Result<Option<usize>, String> {
            get(name).map(|v| v.trim().parse().map_err(|_| format!("{name}={v}: expected a number"))).transpose()
        };
        let [rank, world, local] = if get("RANK").is_some() || get("WORLD_SIZE").is_some() {
            ["RANK", "WORLD_SIZE", "LOCAL_RANK"]
        } else if get("SLURM_PROCID").is_some() && get("MASTER_ADDR").is_some() {
            ["SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"]
        } else {
            return Ok(None);
        };
        let need =
            |name: &str| number(name)?.ok_or_else(|| format!("{name} is not set, but its fellow is: expected both {rank} and {world}"));
        let (r, w) = (need(rank)?, need(world)?);
        if r >= w {
            return Err(format!("{rank}={r}: expected less than {world}={w}"));
        }
        let port = |name: &str| -> Result<Option<u16>, String> {
            get(name).map(|v| v.trim().parse().map_err(|_| format!("{name}={v}: expected a port"))).transpose()
        };
        let port = match (port("PRISM_PORT")?, port("MASTER_PORT")?) {
            (Some(own), _) => own,
            // There torchrun itself listens.
            (None, Some(master)) if get("TORCHELASTIC_USE_AGENT_STORE").is_some_and(|v| v == "True") => {
                master.checked_add(1).unwrap_or(PORT)
            }
            (None, master) => master.unwrap_or(PORT),
        };
        let host = match get("MASTER_ADDR") {
            Some(host) => host,
            None if w == 1 => "127.0.0.1".into(),
            None => return Err(format!("MASTER_ADDR is not set: expected the host of process 0 of {w}")),
        };
        Ok(Some(Place { rank: r, world: w, local: number(local)?.unwrap_or(0), address: format!("{host}:{port}") }))
    }
}

/// How this process reaches the others.
enum Wire {
    Alone,
    /// Process 0 has all others, by rank from 1.
    Hub(Vec<TcpStream>),
    /// The others have process 0.
    Spoke(TcpStream),
}

/// The processes that train together.
pub struct Peers {
    rank: usize,
    world: usize,
    wire: Mutex<Wire>,
    /// Whether gradients are added by NCCL.
    grouped: bool,
}

impl Peers {
    /// No others.
    pub fn alone() -> Peers {
        Peers { rank: 0, world: 1, wire: Mutex::new(Wire::Alone), grouped: false }
    }

    /// Meets the others. All must bring the same `run`: a description of what they are about to do. On a GPU they also form an NCCL group, of one process too.
    pub fn meet(place: &Place, device: &Device, run: &str) -> Result<Peers, String> {
        let listener = if place.rank == 0 && place.world > 1 {
            let fail = |e| format!("{}: cannot listen for the other {} processes: {e}", place.address, place.world - 1);
            Some(TcpListener::bind(&place.address).map_err(fail)?)
        } else {
            None
        };
        Peers::meet_at(place, listener, device, run)
    }

    fn meet_at(place: &Place, listener: Option<TcpListener>, device: &Device, run: &str) -> Result<Peers, String> {
        let Place { rank, world, address, .. } = place;
        let wire = match listener {
            _ if *world == 1 => Wire::Alone,
            Some(listener) => Wire::Hub(gather(&listener, *world, run)?),
            None => Wire::Spoke(call(address, *rank, *world, run)?),
        };
        let mut peers = Peers { rank: *rank, world: *world, wire: Mutex::new(wire), grouped: false };
        if let Device::Cuda(cuda) = device
            && cuda.has_groups(*world > 1)
        {
            let fail = |e: crate::device::CudaError| format!("NCCL: {e}");
            let mut id = if *rank == 0 { cuda.group_id().map_err(fail)? } else { vec![0; 128] };
            peers.broadcast(&mut id)?;
            cuda.join_group(&id, *rank, *world).map_err(fail)?;
            peers.grouped = true;
        }
        Ok(peers)
    }

    /// Which this process is, from 0. Process 0 writes files.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// How many processes there are.
    pub fn world(&self) -> usize {
        self.world
    }

    /// The items of a batch that are this process's.
    pub fn share(&self, batch: usize) -> Range<usize> {
        self.rank * batch / self.world..(self.rank + 1) * batch / self.world
    }

    /// The device that does NCCL's sums, where that is how gradients are added.
    pub fn group<'d>(&self, device: &'d Device) -> Option<&'d Cuda> {
        match device {
            Device::Cuda(cuda) if self.grouped => Some(cuda),
            _ => None,
        }
    }

    /// Adds up everybody's `values`, which become the sum in every process.
    pub fn sum<T: bytemuck::Pod + std::ops::AddAssign>(&self, values: &mut [T]) -> Result<(), String> {
        let mut wire = self.wire.lock().unwrap_or_else(|e| e.into_inner());
        match &mut *wire {
            Wire::Alone => Ok(()),
            Wire::Hub(others) => {
                let mut theirs = values.to_vec();
                for (at, other) in others.iter_mut().enumerate() {
                    receive(other, bytemuck::cast_slice_mut(&mut theirs)).map_err(|e| gone(at + 1, &e))?;
                    values.iter_mut().zip(&theirs).for_each(|(v, t)| *v += *t);
                }
                others
                    .iter_mut()
                    .enumerate()
                    .try_for_each(|(at, other)| send(other, bytemuck::cast_slice(values)).map_err(|e| gone(at + 1, &e)))
            }
            Wire::Spoke(first) => {
                send(first, bytemuck::cast_slice(values)).map_err(|e| gone(0, &e))?;
                receive(first, bytemuck::cast_slice_mut(values)).map_err(|e| gone(0, &e))
            }
        }
    }

    /// Gives everybody process 0's bytes.
    fn broadcast(&self, bytes: &mut [u8]) -> Result<(), String> {
        let mut wire = self.wire.lock().unwrap_or_else(|e| e.into_inner());
        match &mut *wire {
            Wire::Alone => Ok(()),
            Wire::Hub(others) => others.iter_mut().enumerate().try_for_each(|(at, o)| send(o, bytes).map_err(|e| gone(at + 1, &e))),
            Wire::Spoke(first) => receive(first, bytes).map_err(|e| gone(0, &e)),
        }
    }
}

fn gone(rank: usize, e: &std::io::Error) -> String {
    format!("process {rank} of this training run is gone ({e}); start all of them again with --resume")
}

/// A message: its length, so that a difference in what two processes expect is an error and not a wait, and its bytes.
fn send(to: &mut TcpStream, bytes: &[u8]) -> std::io::Result<()> {
    to.write_all(&(bytes.len() as u64).to_le_bytes())?;
    to.write_all(bytes)
}

fn receive(from: &mut TcpStream, bytes: &mut [u8]) -> std::io::Result<()> {
    let mut length = [0u8; 8];
    from.read_exact(&mut length)?;
    let length = u64::from_le_bytes(length);
    if length != bytes.len() as u64 {
        return Err(std::io::Error::other(format!("it sent {length} bytes where {} were expected", bytes.len())));
    }
    from.read_exact(bytes)
}

/// What processes say first: who they are, and what they are about to do.
fn greeting(rank: usize, world: usize, run: &str) -> Vec<u8> {
    let mut bytes = b"prism\0\0\x01".to_vec();
    bytes.extend((rank as u64).to_le_bytes());
    bytes.extend((world as u64).to_le_bytes());
    // FNV-1a.
    let hash = run.bytes().fold(0xcbf2_9ce4_8422_2325u64, |h, b| (h ^ b as u64).wrapping_mul(0x0000_0100_0000_01b3));
    bytes.extend(hash.to_le_bytes());
    bytes
}

fn gather(listener: &TcpListener, world: usize, run: &str) -> Result<Vec<TcpStream>, String> {
    let fail = |e: std::io::Error| format!("waiting for the other processes: {e}");
    let until = Instant::now() + PATIENCE;
    let mut others: Vec<Option<TcpStream>> = (1..world).map(|_| None).collect();
    listener.set_nonblocking(true).map_err(fail)?;
    while others.iter().any(Option::is_none) {
        let mut stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock && Instant::now() < until => {
                std::thread::sleep(Duration::from_millis(20));
                continue;
            }
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {
                let here = 1 + others.iter().flatten().count();
                return Err(format!("only {here} of {world} processes appeared within {} s", PATIENCE.as_secs()));
            }
            Err(e) => return Err(fail(e)),
        };
        stream.set_nonblocking(false).map_err(fail)?;
        stream.set_read_timeout(Some(Duration::from_secs(10))).map_err(fail)?;
        let mut said = vec![0; greeting(0, world, run).len()];
        // Whoever says something else is not one of us.
        if receive(&mut stream, &mut said).is_err() {
            continue;
        }
        let rank = said[8..16].iter().rev().fold(0u64, |v, b| v << 8 | *b as u64) as usize;
        let known = (1..world).contains(&rank) && said == greeting(rank, world, run) && others[rank - 1].is_none();
        send(&mut stream, &[u8::from(known)]).map_err(fail)?;
        if !known {
            return Err(format!("process {rank} came with other settings, another number of processes, or a rank that is taken"));
        }
        stream.set_read_timeout(None).map_err(fail)?;
        stream.set_nodelay(true).map_err(fail)?;
        others[rank - 1] = Some(stream);
    }
    Ok(others.into_iter().flatten().collect())
}

fn call(address: &str, rank: usize, world: usize, run: &str) -> Result<TcpStream, String> {
    let fail = |e: std::io::Error| format!("{address}: cannot reach process 0: {e}");
    let until = Instant::now() + PATIENCE;
    let mut stream = loop {
        let found = address.to_socket_addrs().and_then(|mut list| list.next().ok_or_else(|| std::io::Error::other("no such host")));
        match found.and_then(|to| TcpStream::connect_timeout(&to, Duration::from_secs(5))) {
            Ok(stream) => break stream,
            Err(e) if Instant::now() > until => return Err(fail(e)),
            Err(_) => std::thread::sleep(Duration::from_millis(100)),
        }
    };
    stream.set_nodelay(true).map_err(fail)?;
    send(&mut stream, &greeting(rank, world, run)).map_err(fail)?;
    let mut welcome = [0];
    receive(&mut stream, &mut welcome).map_err(fail)?;
    match welcome {
        [1] => Ok(stream),
        _ => Err(format!("{address}: process 0 has other settings, another number of processes, or a process {rank} already")),
    }
}

/// For hooks of ops.
pub(crate) fn op_error(message: String) -> OpError {
    OpError::Argument { op: "sum of gradients", message }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(vars: &[(&str, &str)]) -> Result<Option<Place>, String> {
        Place::from_variables(|name| vars.iter().find(|(n, _)| *n == name).map(|(_, v)| v.to_string()))
    }

    #[test]
    fn places_come_from_torchrun_or_slurm() {
        assert_eq!(place(&[]), Ok(None));
        let torchrun = [("RANK", "3"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "1"), ("MASTER_ADDR", "node7"), ("MASTER_PORT", "1234")];
        let expected = Place { rank: 3, world: 8, local: 1, address: "node7:1234".into() };
        assert_eq!(place(&torchrun), Ok(Some(expected.clone())));
        let slurm = [("SLURM_PROCID", "3"), ("SLURM_NTASKS", "8"), ("SLURM_LOCALID", "1"), ("MASTER_ADDR", "node7")];
        assert_eq!(place(&slurm), Ok(Some(Place { address: "node7:29500".into(), ..expected })));
        let listening = [&torchrun[..], &[("TORCHELASTIC_USE_AGENT_STORE", "True")]].concat();
        assert_eq!(place(&listening).unwrap().unwrap().address, "node7:1235");
        let own = [&listening[..], &[("PRISM_PORT", "99")]].concat();
        assert_eq!(place(&own).unwrap().unwrap().address, "node7:99");
        // A batch script's own process has SLURM's variables too.
        assert_eq!(place(&slurm[..3]), Ok(None));
        assert_eq!(place(&[("RANK", "0"), ("WORLD_SIZE", "1")]).unwrap().unwrap().address, "127.0.0.1:29500");
        for (vars, said) in [
            (&[("RANK", "0")][..], "WORLD_SIZE is not set"),
            (&[("RANK", "2"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "a")], "RANK=2: expected less than WORLD_SIZE=2"),
            (&[("RANK", "x"), ("WORLD_SIZE", "2")], "RANK=x: expected a number"),
            (&[("RANK", "0"), ("WORLD_SIZE", "2")], "MASTER_ADDR is not set"),
        ] {
            let error = place(vars).unwrap_err();
            assert!(error.contains(said), "{error}");
        }
    }

    /// Peers in threads, each doing `work`.
    fn together<R: Send>(world: usize, run: impl Fn(usize) -> String + Sync, work: impl Fn(Result<Peers, String>) -> R + Sync) -> Vec<R> {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let mut listener = Some(listener);
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..world)
                .map(|rank| {
                    let place = Place { rank, world, local: rank, address: address.clone() };
                    let (listener, run, work) = (if rank == 0 { listener.take() } else { None }, &run, &work);
                    scope.spawn(move || work(Peers::meet_at(&place, listener, &Device::open("cpu", 1).unwrap(), &run(rank))))
                })
                .collect();
            threads.into_iter().map(|t| t.join().unwrap()).collect()
        })
    }

    #[test]
    fn sums_are_everybodys() {
        let sums = together(
            3,
            |_| "same".into(),
            |peers| {
                let peers = peers.unwrap();
                let mut values = [peers.rank() as f64 + 1.0, 10.0];
                peers.sum(&mut values).unwrap();
                let mut more = vec![peers.rank() as f32; 100_000];
                peers.sum(&mut more).unwrap();
                assert!(more.iter().all(|v| *v == 3.0));
                values
            },
        );
        assert_eq!(sums, [[6.0, 30.0]; 3]);
    }

    #[test]
    fn shares_of_a_batch_are_all_of_it() {
        for world in 1..6 {
            for batch in world..12 {
                let shares = (0..world).map(|rank| Peers { rank, world, ..Peers::alone() }.share(batch));
                let items: Vec<usize> = shares.inspect(|s| assert!(!s.is_empty())).flatten().collect();
                assert_eq!(items, (0..batch).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn other_settings_are_refused_by_both_sides() {
        let said = together(2, |rank| format!("learning rate {rank}"), |peers| peers.err().unwrap());
        assert!(said[0].contains("process 1 came with other settings") && said[1].contains("process 0 has other settings"), "{said:?}");
    }

    #[test]
    fn a_process_that_leaves_is_named() {
        let said = together(
            2,
            |_| "same".into(),
            |peers| {
                let peers = peers.unwrap();
                if peers.rank() == 1 { String::new() } else { peers.sum(&mut [0.0f64]).unwrap_err() }
            },
        );
        assert!(said[0].contains("process 1 of this training run is gone"), "{said:?}");
    }
}
