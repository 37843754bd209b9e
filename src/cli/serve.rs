//! `prism serve`: a server for viewers and programs.

use super::model::{Chosen, ModelArgs};
use super::{DeviceArgs, Failure, note, number, on_interrupt, say, warn};
use crate::memory::size_of_text;
use crate::model::Model;
use crate::serve::{
    BIND, DLS, Keep, MOST_IDLE, MOST_SESSIONS, STATE_BYTES, STATE_DAYS, Secret, Server, Settings,
};
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

/// Serve viewers (3D Slicer, napari, browsers) and programs over HTTP
///
/// Serves until it is stopped: 3D Slicer and napari through the nnInteractive protocol, ITK-SNAP
/// and MONAI Label clients through theirs, browsers through a web page, and programs through
/// prism's own API. With --dicom, MONAI Label clients can use the series in a folder without
/// sending them.
///
/// The server accepts connections from this machine only, unless --bind says otherwise; then a
/// token is required. Nothing that clients send is kept beyond their session or written to disk,
/// unless --state names a folder for it: then nothing is lost in a restart or a crash. Ctrl-C
/// finishes running requests; a second Ctrl-C stops at once.
#[derive(Args)]
pub struct Serve {
    #[command(flatten)]
    model: ModelArgs,
    /// Address to listen at; port 0 selects a free port
    #[arg(long, value_name = "HOST:PORT", default_value = BIND)]
    bind: String,
    /// Additional local port for the ITK-SNAP protocol [without a number: 8911]. It asks for no
    /// token: every user of this machine can connect to it
    #[arg(long, value_name = "PORT", num_args = 0..=1, default_missing_value = DLS)]
    dls: Option<u16>,
    /// Secret that clients must send; other users of this machine may see it in the process list
    /// [default: the variable PRISM_TOKEN]
    #[arg(long, value_name = "TEXT", conflicts_with = "token_file")]
    token: Option<String>,
    /// File with the secret [default: the variable PRISM_TOKEN]
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// Maximum number of scans and clients at a time; further ones are told to try again later
    #[arg(long, value_name = "N", default_value_t = 16)]
    #[arg(value_parser = number(1, MOST_SESSIONS as u64))]
    max_sessions: usize,
    /// Seconds without use after which a scan is released
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    #[arg(value_parser = clap::value_parser!(u64).range(1..=MOST_IDLE.as_secs()))]
    idle_timeout: u64,
    /// Origin of another web page whose scripts may call the server, such as
    /// https://viewer.example.org
    #[arg(long, value_name = "URL")]
    allow_origin: Option<String>,
    /// Folder that keeps scans, prompts and masks until they are released or time out, so that
    /// clients find them after a restart or a crash; it must be private to its owner and used by
    /// one server only
    #[arg(long, value_name = "DIR")]
    state: Option<PathBuf>,
    /// Maximum size of the --state folder, such as 8G [default: 32Gi]
    #[arg(long, value_name = "SIZE", value_parser = size_of_text, requires = "state")]
    state_bytes: Option<u64>,
    /// Days without use after which a starting server deletes a scan from the --state folder
    /// [default: 30]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=36500))]
    #[arg(requires = "state")]
    state_days: Option<u64>,
    /// Folder of DICOM series, searched recursively, that MONAI Label clients (OHIF extension, 3D
    /// Slicer) request by SeriesInstanceUID; every client may request all of them
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
                note("\nfinishing running requests; a second Ctrl-C stops at once");
            }
            again
        });
        let (address, dls) = (server.address(), server.dls_address());
        say(&greeting(address, dls, has_token, &device.describe()))?;
        if !address.ip().is_loopback() {
            warn(
                "other machines can connect: scans and the token cross the network unencrypted; put a TLS proxy in front, or use a tunnel",
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
            "clients need the token: as the key in 3D Slicer and napari, as #token=... at the end of the page's address"
        }
        false => "no token: every user of this machine can connect",
    };
    // ITK-SNAP cannot send a token.
    let snap = match dls {
        Some(own) => format!(
            "ITK-SNAP: host {}, port {}, for every user of this machine, without a token\n",
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
