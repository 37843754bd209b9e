//! A server that viewers work with.
//!
//! At one address it speaks nnInteractive's protocol, which 3D Slicer and napari use, ITK-SNAP's,
//! MONAI Label's, and an interface of its own for programs (`/openapi.json` describes it), and has
//! a page for browsers.
//!
//! ```no_run
//! use prism::serve::{Keep, Server, Settings};
//! use prism::{Device, Model, Weights};
//! use std::{path::Path, sync::Arc};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let device = Device::open("cpu", 0)?;
//! let weights = Weights::open(Path::new("model.safetensors"))?;
//! let model = Arc::new(Model::new(&device, &weights)?);
//!
//! let settings = Settings { keep: Some(Keep::at("state")), ..Settings::default() };
//! let server = Server::open(settings, model, "model")?;
//! println!("http://{}", server.address());
//! let stop = server.stopper(); // its `stop` ends the server, from another thread
//! server.run()?;
//! # Ok(())
//! # }
//! ```
//!
//! Which threads do what: requests that cost nothing are answered by the threads that read from the
//! network ([`Server::run`]); everything else waits for its turn on threads of its own (`work.rs`).
//! If a client disconnects while it waits, its work is dropped.
//!
//! Nothing that callers send is trusted: sizes are checked against limits before memory is
//! requested (`body.rs`, `wire.rs`), only the endings of file names are used, and headers that name
//! other files are refused; the name of a series is looked up among those that the server found in
//! its folder (`shelf.rs`), and is never used as a path. No voxel and no name from a caller is
//! written anywhere except in the folder that a server is given for its state (`journal.rs`).

mod answer;
mod api;
mod arrived;
mod blosc2;
mod body;
mod clicked;
mod datastore;
mod dls;
mod door;
mod failure;
mod found;
mod guard;
mod journal;
mod lease;
mod metrics;
mod monai;
mod multipart;
mod nninteractive;
mod opened;
mod page;
mod query;
#[doc(hidden)]
pub mod readers;
mod restore;
mod rounds;
mod settings;
mod shelf;
mod store;
mod turns;
mod wire;
mod work;

pub use settings::{
    BIND, DLS, Keep, MOST_IDLE, MOST_SESSIONS, STATE_BYTES, STATE_DAYS, Secret, Settings,
};

use crate::memory;
use crate::model::Model;
use crate::session::Encodings;
use axum::Router;
use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::http::header::{CONTENT_TYPE, HeaderValue};
use axum::middleware::from_fn_with_state;
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, get};
use door::Door;
use failure::{Failure, reply};
use found::Found;
use guard::Entry;
use journal::{Folder, Kept};
use metrics::{Gauges, Metrics};
use opened::Engine;
use restore::Progress;
use serde_json::json;
use shelf::Shelf;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, ToSocketAddrs};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use store::Store;
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;
use turns::Turn;
use work::{Key, Kind, Work};

/// Threads that read from the network and answer what costs nothing.
const THREADS: usize = 2;
/// How often unused objects are looked for.
const SWEEP: Duration = Duration::from_millis(500);
/// The time without held objects after which memory kept for later goes back to the system.
const REST: Duration = Duration::from_secs(60);

/// The description of prism's own interface, for programs that read such descriptions.
const OPENAPI: &str = include_str!("openapi.json");

/// The error for a path that does not exist.
const SPOKEN: &str = "no such path: this server supports the nnInteractive protocol, version 2 (/claim, /set_image, ...), those of ITK-SNAP (/start_session, ...) and MONAI Label (/info/, /session/, ...), and prism's own (/v1, described in /openapi.json); / is a web page";

/// A path and its handler.
type Route = (&'static str, MethodRouter<Arc<Shared>>);

/// What all handlers share.
struct Shared {
    settings: Settings,
    /// The model's name.
    name: String,
    model: Arc<Model>,
    store: Store,
    work: Work,
    metrics: Metrics,
    /// The kept encodings of all scans.
    encodings: Arc<Encodings>,
    /// The most bytes of a scan.
    most_scan: usize,
    /// Whether only this machine's programs can call.
    is_local: bool,
    /// How far the restoration of what an earlier server left has come.
    progress: Progress,
    /// The series of the folder that it was given, if it was.
    shelf: Option<Shelf>,
}

impl Shared {
    /// What scans are worked on with.
    fn engine(&self) -> Engine<'_> {
        let Shared { model, settings, encodings, .. } = self;
        Engine { model, options: settings.options(), encodings }
    }
}

/// A server that listens, and answers once it [runs](Server::run).
pub struct Server {
    listener: TcpListener,
    address: SocketAddr,
    /// The listener at which only ITK-SNAP's protocol is served.
    dls: Option<(TcpListener, SocketAddr)>,
    shared: Arc<Shared>,
    stop: Stop,
    /// What an earlier server left, to be restored, and what was odd about it so far.
    found: Vec<Found>,
    warnings: Vec<String>,
}

/// A handle that ends a server, from any thread.
#[derive(Clone, Default)]
pub struct Stop(Arc<Notify>);

impl Stop {
    /// Makes the server finish what is running, and end: its [`Server::run`] returns. Does not wait
    /// for that. Called before the server runs, it ends it at once.
    pub fn stop(&self) {
        self.0.notify_one();
    }
}

/// A handle to wait until what an earlier server left on disk has been restored.
pub struct Restored(Arc<Shared>);

impl Restored {
    /// Waits until everything has been restored, or the server ends, and returns what was odd, as
    /// text for people.
    ///
    /// [`Server::run`] restores, on another thread: this must not be waited for before it is
    /// called.
    pub fn wait(&self) -> Vec<String> {
        self.0.progress.wait()
    }
}

impl Server {
    /// Begins to listen. Clients see the model under the name `name`.
    ///
    /// # Errors
    /// A setting is invalid, the address is in use or not this machine's, threads cannot be
    /// started, the folder for the state cannot be opened or lies in that of the DICOM series, or
    /// the latter cannot be read.
    pub fn open(settings: Settings, model: Arc<Model>, name: &str) -> Result<Server, String> {
        let addresses = settings.addresses()?;
        // Before anything is created or deleted, and before any client can call.
        if let (Some(keep), Some(dicom)) = (&settings.keep, &settings.dicom)
            && lies_within(&keep.folder, dicom)
        {
            return Err(format!(
                "{}: --state cannot be inside {}: scans of one client would be served to others as its series",
                keep.folder.display(),
                dicom.display()
            ));
        }
        let (most_scan, mut warnings) = (settings.most_scan(), vec![]);
        let shelf = match &settings.dicom {
            Some(folder) => {
                Some(Shelf::open(folder, most_scan as u64, settings.warn, &mut warnings)?)
            }
            None => None,
        };
        let (listener, address) = listen(&addresses[..])
            .map_err(|e| format!("cannot listen at {}: {e}", settings.bind))?;
        let local = |port: u16| {
            listen((Ipv4Addr::LOCALHOST, port))
                .map_err(|e| format!("cannot listen at 127.0.0.1:{port} for ITK-SNAP: {e}"))
        };
        let dls = settings.dls.map(local).transpose()?;
        let folder = match &settings.keep {
            Some(keep) => {
                let about = restore::about(&model, name);
                let folder = Folder::open(keep, &about)?;
                warnings.extend(folder.warning());
                Some(Arc::new(folder))
            }
            None => None,
        };
        let found = match &folder {
            Some(folder) => folder.found(&mut warnings)?,
            None => vec![],
        };
        let work = Work::start(settings.max_sessions)?;
        let shared = Shared {
            store: Store::new(&settings, folder),
            most_scan,
            is_local: address.ip().is_loopback(),
            encodings: Arc::new(Encodings::new(settings.encodings(model.device()))),
            settings,
            name: name.into(),
            model,
            work,
            metrics: Metrics::default(),
            progress: Progress::new(found.len()),
            shelf,
        };
        if found.is_empty() {
            shared.progress.end(std::mem::take(&mut warnings));
        }
        let (shared, stop) = (Arc::new(shared), Stop::default());
        Ok(Server { listener, address, dls, shared, stop, found, warnings })
    }

    /// A handle to wait until what an earlier server left in the folder for the state has been
    /// restored. Until then requests are refused with status 503, except for `/healthz` and the
    /// page's own files.
    pub fn restored(&self) -> Restored {
        Restored(self.shared.clone())
    }

    /// The address that it listens at, with the actual port.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The address at which only ITK-SNAP's protocol is served, without a token, if there is one.
    pub fn dls_address(&self) -> Option<SocketAddr> {
        self.dls.as_ref().map(|(_, address)| *address)
    }

    /// A handle that ends this server.
    pub fn stopper(&self) -> Stop {
        self.stop.clone()
    }

    /// The paths that `/openapi.json` describes, as it writes them. Those of ITK-SNAP's and MONAI
    /// Label's protocols are not among them: their authors describe them.
    pub fn paths() -> Vec<&'static str> {
        described().into_iter().map(|(path, _)| path).collect()
    }

    /// Answers requests until it is told to stop ([`Server::stopper`]), finishes what was begun by
    /// then, and returns.
    ///
    /// # Errors
    /// The system refuses threads, or the network fails.
    pub fn run(self) -> Result<(), String> {
        let Server { listener, dls, shared, stop, found, warnings, .. } = self;
        let no_threads = |e: std::io::Error| {
            shared.progress.end(vec![]);
            format!("cannot start threads: {e}")
        };
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(THREADS)
            .thread_name("prism-serve")
            .enable_all()
            .build()
            .map_err(no_threads)?;
        let mut restorer = None;
        if !found.is_empty() {
            let there = shared.clone();
            let thread = std::thread::Builder::new()
                .name("prism-restore".into())
                .spawn(move || restore::restore(&there, found, warnings))
                .map_err(no_threads)?;
            restorer = Some(thread);
        }
        let served = runtime.block_on(async {
            let sweeper = tokio::spawn(sweep(shared.clone()));
            // Tasks that wait for the end are woken when the other side is dropped.
            let (tells, told) = watch::channel(());
            let stopper = tokio::spawn(async move {
                stop.0.notified().await;
                drop(tells);
            });
            let mut dls_paths = vec![("/healthz", get(healthz))];
            dls_paths.extend(dls::routes());
            let beside = match dls {
                Some((listener, _)) => {
                    let app = router(&shared, dls_paths, true);
                    Some(tokio::spawn(serve(listener, app, told.clone())))
                }
                None => None,
            };
            let served = serve(listener, router(&shared, all(), false), told).await;
            stopper.abort();
            if let Some(beside) = beside {
                let _ = beside.await;
            }
            sweeper.abort();
            served
        });
        shared.progress.stop();
        if let Some(thread) = restorer {
            let _ = thread.join();
        }
        shared.work.close();
        shared.store.clear();
        served.map_err(|e: std::io::Error| format!("the network failed: {e}"))
    }
}

/// Whether a folder is the same as another, or inside it; also if it does not exist yet.
fn lies_within(folder: &Path, other: &Path) -> bool {
    let whole = |path: &Path| path.canonicalize().ok();
    let here = |path: &Path| whole(if path.as_os_str().is_empty() { ".".as_ref() } else { path });
    let there = folder.ancestors().find_map(here);
    there.zip(whole(other)).is_some_and(|(folder, other)| folder.starts_with(other))
}

fn listen(to: impl ToSocketAddrs) -> std::io::Result<(TcpListener, SocketAddr)> {
    let listener = TcpListener::bind(to)?;
    listener.set_nonblocking(true)?;
    let address = listener.local_addr()?;
    Ok((listener, address))
}

/// Answers requests until `told` reports the end.
async fn serve(
    listener: TcpListener,
    app: Router,
    mut told: watch::Receiver<()>,
) -> std::io::Result<()> {
    let listener = tokio::net::TcpListener::from_std(listener)?;
    let end = async move {
        let _ = told.changed().await;
    };
    let served = axum::serve(Door::new(listener), app.into_make_service());
    served.with_graceful_shutdown(end).await
}

/// Lets the store drop something on a thread that does not delay any request: memory and files are
/// given back there, which may take a while.
async fn aside<T: Send + 'static>(
    shared: &Arc<Shared>,
    work: impl FnOnce(&Store) -> T + Send + 'static,
) -> Result<T, Failure> {
    let there = shared.clone();
    let done = tokio::task::spawn_blocking(move || work(&there.store)).await;
    done.map_err(|_| Failure::new(StatusCode::INTERNAL_SERVER_ERROR, "internal server error"))
}

/// Lets go what a request held. If it was released meanwhile this is its end, and its memory and
/// files are given back on a thread that does not delay any request.
fn let_go<T: Send + Sync + 'static>(held: Arc<T>) {
    if let Some(last) = Arc::into_inner(held) {
        freed(last);
    }
}

/// Drops something large on a thread that does not delay any request; the result can be waited for.
fn freed<T: Send + 'static>(gone: T) -> JoinHandle<()> {
    tokio::task::spawn_blocking(move || drop(gone))
}

/// Has the journal of an object that is worked on under `key` rewritten, if it became long: when
/// its turn comes, without a request waiting for it.
fn tidy<T>(shared: &Arc<Shared>, key: Key, held: Arc<T>)
where
    T: Kept + Send + Sync + 'static,
{
    if !held.journal().is_some_and(|journal| journal.seems_long()) {
        return let_go(held);
    }
    let there = shared.clone();
    tokio::spawn(async move {
        // If that fails the old one is as good, and the next attempt comes when it has grown.
        let _ = there.work.run(key, Kind::Other, move |_: &Turn| held.renew()).await;
    });
}

/// Drops unused objects. If nothing was held for [`REST`], memory that is kept for later use goes
/// back to the system.
async fn sweep(shared: Arc<Shared>) {
    // While nothing is held: since when, what tells of callers in between, whether memory went.
    let mut rest: Option<(Instant, u64, bool)> = None;
    loop {
        tokio::time::sleep(SWEEP).await;
        // Until everything is restored no caller can show a sign of life.
        if shared.progress.now().is_some() {
            continue;
        }
        let swept = |store: &Store| {
            store.sweep();
            store.empty()
        };
        let Some(comings) = aside(&shared, swept).await.ok().flatten() else {
            rest = None;
            continue;
        };
        match rest {
            Some((since, before, gone)) if before == comings => {
                if !gone && since.elapsed() >= REST {
                    let _ = aside(&shared, |_: &Store| memory::give_back()).await;
                    rest = Some((since, comings, true));
                }
            }
            _ => rest = Some((Instant::now(), comings, false)),
        }
    }
}

/// The paths of nnInteractive's protocol and prism's own.
fn described() -> Vec<Route> {
    let mut all = vec![
        ("/healthz", get(healthz)),
        ("/metrics", get(metrics_text)),
        ("/openapi.json", get(openapi)),
    ];
    all.extend(api::routes());
    all.extend(nninteractive::routes());
    all
}

/// All paths.
fn all() -> Vec<Route> {
    let mut all = described();
    all.extend(dls::routes());
    all.extend(monai::routes());
    all.extend(datastore::routes());
    all.extend(page::paths().map(|path| (path, get(page_file))));
    all
}

fn router(shared: &Arc<Shared>, routes: Vec<Route>, keyless: bool) -> Router {
    let mut router = Router::new();
    for (path, answers) in routes {
        router = router.route(path, answers);
    }
    let entry = Entry { shared: shared.clone(), keyless };
    router
        .fallback(|| async { Failure::unknown(SPOKEN) })
        .method_not_allowed_fallback(|| async {
            Failure::new(StatusCode::METHOD_NOT_ALLOWED, "method not allowed for this path")
        })
        .layer(from_fn_with_state(entry, guard::guard))
        .with_state(shared.clone())
}

async fn healthz(State(shared): State<Arc<Shared>>) -> Response {
    let mut about = json!({ "ok": true });
    if let Some((done, all)) = shared.progress.now() {
        about["restoring"] = json!({ "done": done, "of": all });
    }
    reply(StatusCode::OK, &about)
}

async fn metrics_text(State(shared): State<Arc<Shared>>) -> Response {
    let (leases, sessions, scans) = shared.store.counts();
    let turns = shared.work.counts();
    let now = Gauges {
        leases,
        sessions,
        scans,
        arriving: shared.store.arriving(),
        waiting: turns.waiting,
        paused: turns.paused,
        used: memory::used(),
        limit: memory::limit(),
        encoded: shared.encodings.made(),
        dropped: shared.encodings.dropped(),
        overtaken: turns.overtaken,
    };
    typed("text/plain; version=0.0.4", shared.metrics.text(&now))
}

async fn openapi() -> Response {
    typed("application/json", OPENAPI.into())
}

fn typed(kind: &'static str, text: String) -> Response {
    let mut response = text.into_response();
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}

async fn page_file(request: Request) -> Response {
    page::file(request.uri().path())
        .unwrap_or_else(|| Failure::unknown("no such file").into_response())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn what_was_released_meanwhile_ends_on_no_thread_that_answers() {
        use std::sync::mpsc::{Sender, channel};
        use std::thread::{ThreadId, current};
        struct Slow(Sender<ThreadId>);
        impl Drop for Slow {
            fn drop(&mut self) {
                let _ = self.0.send(current().id());
            }
        }
        let (tells, told) = channel();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async { let_go(Arc::new(Slow(tells.clone()))) });
        assert_ne!(told.recv(), Ok(current().id()));
        runtime.block_on(async { freed(Slow(tells)).await.unwrap() });
        assert_ne!(told.recv(), Ok(current().id()));
    }

    #[test]
    fn every_path_is_described_and_every_description_has_a_path() {
        let described: serde_json::Value = serde_json::from_str(OPENAPI).unwrap();
        let described: BTreeSet<&str> =
            described["paths"].as_object().unwrap().keys().map(String::as_str).collect();
        let paths = Server::paths();
        let there: BTreeSet<&str> = paths.iter().copied().collect();
        assert_eq!(there.len(), paths.len());
        assert_eq!(described, there);
        // No path is listed twice either: a router refuses that.
        let every: BTreeSet<&str> = all().into_iter().map(|(path, _)| path).collect();
        assert_eq!(every.len(), all().len());
    }
}
