//! `prism serve`: a server for viewers and programs.

use super::model::{Chosen, ModelArgs};
use super::{DeviceArgs, Failure, note, on_interrupt, say, warn};
use crate::memory::size_of_text;
use crate::model::Model;
use crate::serve::{BIND, DLS, Keep, STATE_BYTES, STATE_DAYS, Secret, Server, Settings};
use clap::Args;
use std::io::Read;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// The variable with the token.
const VARIABLE: &str = "PRISM_TOKEN";
/// The longest token.
const MOST_TOKEN: u64 = 4096;

/// Serve viewers (3D Slicer, napari, browsers) and programs
///
/// Serves viewers and programs until it is told to end: 3D Slicer and napari by nnInteractive's
/// protocol, ITK-SNAP and MONAI Label's clients by theirs, browsers by a page, programs by an
/// interface of its own. With --dicom, MONAI Label's clients find the series of a folder there and
/// need not send them.
///
/// It is for this machine alone unless --bind says otherwise; where others can call, they need a
/// token. Nothing that is sent is kept beyond its session, or written anywhere, unless --state
/// names a folder for it: then a restart or a crash loses nothing. Ctrl-C finishes what runs, a
/// second one gives up.
#[derive(Args)]
pub struct Serve {
    #[command(flatten)]
    model: ModelArgs,
    /// Where to listen; port 0 for one that is free
    #[arg(long, value_name = "HOST:PORT", default_value = BIND)]
    bind: String,
    /// Port, of this machine alone, where ITK-SNAP's protocol is spoken too [8911 where none is
    /// given]. It asks for no token: every user of this machine can call there
    #[arg(long, value_name = "PORT", num_args = 0..=1, default_missing_value = DLS)]
    dls: Option<u16>,
    /// Secret that callers have to know; others on this machine may see it in the list of
    /// processes [default: the variable PRISM_TOKEN]
    #[arg(long, value_name = "TEXT", conflicts_with = "token_file")]
    token: Option<String>,
    /// File with that secret
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// Scans and clients at a time; others are asked to come again later
    #[arg(long, value_name = "N", default_value_t = 16)]
    max_sessions: usize,
    /// Seconds without a click after which a scan is let go
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    idle_timeout: u64,
    /// Other web page whose scripts may call, by its origin, such as https://viewer.example.org
    #[arg(long, value_name = "URL")]
    allow_origin: Option<String>,
    /// Folder where scans, prompts and answers are kept until they are released or idle, so that
    /// clients find them after a restart or a crash; for its owner alone, and for one server
    #[arg(long, value_name = "DIR")]
    state: Option<PathBuf>,
    /// Bytes that this folder may take, such as 8G [default: 32Gi]
    #[arg(long, value_name = "SIZE", value_parser = size_of_text, requires = "state")]
    state_bytes: Option<u64>,
    /// Days without work after which a scan is deleted from it when a server starts [default: 30]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=36500))]
    #[arg(requires = "state")]
    state_days: Option<u64>,
    /// Folder of DICOM series, with those below it, which MONAI Label's clients (OHIF's extension,
    /// 3D Slicer) ask for by their SeriesInstanceUID; every caller may ask for all of them
    #[arg(long, value_name = "DIR")]
    dicom: Option<PathBuf>,
    #[command(flatten)]
    device: DeviceArgs,
}

impl Serve {
    pub fn run(&self) -> Result<(), Failure> {
        let settings = Settings {
            bind: self.bind.clone(),
            dls: self.dls,
            token: self.secret().map_err(Failure::Usage)?,
            max_sessions: self.max_sessions,
            idle: Duration::from_secs(self.idle_timeout),
            allow_origin: self.allow_origin.clone(),
            keep: self.state.clone().map(|folder| Keep {
                folder,
                bytes: self.state_bytes.unwrap_or(STATE_BYTES),
                age: Duration::from_secs(self.state_days.unwrap_or(STATE_DAYS) * 24 * 3600),
            }),
            dicom: self.dicom.clone(),
            warn: Some(warn),
            ..Settings::default()
        };
        settings.check().map_err(Failure::Usage)?;
        let has_token = settings.token.is_some();
        let chosen = self.model.choose()?;
        let device = self.device.open()?;
        let model = Arc::new(Model::new(&device, &chosen.open()?)?);
        // The first click should not take longer than others.
        model.warm_up()?;
        // The server does not write to paths given by clients.
        crate::input::forget_inputs();
        let server = Server::open(settings, model, &name_of(&chosen)).map_err(Failure::Failed)?;
        let restored = server.restored();
        let told = std::thread::spawn(move || restored.wait().iter().for_each(|text| warn(text)));
        let stopper = server.stopper();
        let asked = AtomicBool::new(false);
        on_interrupt(move |again| {
            if !asked.swap(true, Ordering::Relaxed) {
                stopper.stop();
                note("\nfinishing what runs; a second Ctrl-C gives up");
            }
            again
        });
        let (address, dls) = (server.address(), server.dls_address());
        say(&greeting(address, dls, has_token, &device.describe()))?;
        if !address.ip().is_loopback() {
            warn(
                "others than this machine's programs can call: what they send, and the token, go over the network as they are; put a proxy with TLS in front, or use a tunnel",
            );
        }
        let served = server.run().map_err(Failure::Failed);
        let _ = told.join();
        served
    }

    /// The token: that of the flag or the file, otherwise the variable's.
    fn secret(&self) -> Result<Option<Secret>, String> {
        let (from, text) = match (&self.token, &self.token_file) {
            (Some(text), _) => ("--token".to_string(), text.clone()),
            (None, Some(path)) => (path.display().to_string(), read(path)?),
            (None, None) => match std::env::var(VARIABLE) {
                Ok(text) => (VARIABLE.to_string(), text),
                Err(_) => return Ok(None),
            },
        };
        Secret::new(&text).map(Some).map_err(|e| format!("{from}: {e}"))
    }
}

fn read(path: &Path) -> Result<String, String> {
    let mut text = String::new();
    let read = std::fs::File::open(path)
        .and_then(|file| file.take(MOST_TOKEN + 1).read_to_string(&mut text));
    match read {
        Err(e) => Err(format!("{}: cannot read a token: {e}", path.display())),
        Ok(_) if text.len() as u64 > MOST_TOKEN => {
            Err(format!("{}: longer than {MOST_TOKEN} bytes, expected a token", path.display()))
        }
        Ok(_) => Ok(text),
    }
}

/// The name of a model for clients: never its path.
fn name_of(chosen: &Chosen) -> String {
    let name = chosen.path().and_then(Path::file_name).map(|n| n.to_string_lossy().into_owned());
    name.unwrap_or_else(|| "small".into())
}

/// The messages at the start: the addresses, and how to use them.
fn greeting(address: SocketAddr, dls: Option<SocketAddr>, has_token: bool, device: &str) -> String {
    let host = match address.ip().is_unspecified() {
        // Every address of this machine: others reach it by its name.
        true => sysinfo::System::host_name().unwrap_or_else(|| "localhost".into()),
        false if address.is_ipv6() => format!("[{}]", address.ip()),
        false => address.ip().to_string(),
    };
    let url = format!("http://{host}:{}", address.port());
    let token = match has_token {
        true => {
            "callers need the token: as a key in 3D Slicer and napari, as #token=... behind the page's address"
        }
        false => "no token: whoever uses this machine can call",
    };
    // ITK-SNAP cannot send a token.
    let snap = match dls {
        Some(own) => format!(
            "ITK-SNAP: host {}, port {}, for whoever uses this machine\n",
            own.ip(),
            own.port()
        ),
        None if !has_token => format!("ITK-SNAP: host {host}, port {}\n", address.port()),
        None => String::new(),
    };
    format!(
        "serving at {url} ({device})\n\
         3D Slicer, napari: {url} as the server of nnInteractive, or of MONAI Label\n\
         {snap}browsers: {url}/\n\
         programs: {url}/v1, described by {url}/openapi.json\n\
         {token}\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_greeting_has_an_address_that_can_be_called() {
        let of = |address: &str| greeting(address.parse().unwrap(), None, true, "cpu");
        assert!(of("127.0.0.1:1527").contains("browsers: http://127.0.0.1:1527/\n"));
        assert!(of("[::1]:80").contains("programs: http://[::1]:80/v1,"));
        assert!(!of("0.0.0.0:1527").contains("0.0.0.0"));
        // ITK-SNAP can call if no token is needed.
        let address = "127.0.0.1:1527".parse().unwrap();
        assert!(!of("127.0.0.1:1527").contains("ITK-SNAP"));
        let open = greeting(address, None, false, "cpu");
        assert!(open.contains("ITK-SNAP: host 127.0.0.1, port 1527\n"), "{open}");
        let beside = greeting(address, Some("127.0.0.1:8911".parse().unwrap()), true, "cpu");
        assert!(beside.contains("ITK-SNAP: host 127.0.0.1, port 8911, for"), "{beside}");
    }
}
