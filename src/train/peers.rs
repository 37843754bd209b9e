//! Processes that train one network together, each with its share of every batch.
//!
//! They meet over TCP: process 0 listens, the others connect to it. What they exchange there is
//! added up by process 0 in the order of their ranks and sent back, so all of them continue with
//! the same bits. Gradients on GPUs are added by NCCL instead; its group is announced over the same
//! connections, and left when one of them shows that a process is lost.

pub use super::greeting::Token;
use super::greeting::{Terms, WAYS, call, gather, resolve};
use super::link::{MESSAGE, Wire};
use crate::device::{Cuda, Device};
use crate::memory;
use crate::sync::locked;
use crate::tensor::OpError;
use std::io::Write;
use std::net::TcpListener;
use std::ops::Range;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// How long processes wait for each other to appear.
const PATIENCE: Duration = Duration::from_secs(300);
/// How long process 0 waits for a caller to say who it is.
const GREETING: Duration = Duration::from_secs(10);
/// The most strangers that process 0 listens to at once.
const STRANGERS: usize = 64;
/// A process that gave no sign of life for this long is lost. It gives them whatever it computes.
const SILENCE: Duration = Duration::from_secs(45);
/// The default port of process 0: PyTorch's.
const PORT: u16 = 29500;

/// The place of a process among those that train together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The number of this process, from 0.
    pub rank: usize,
    /// The number of processes.
    pub world: usize,
    /// The number of this process among those on its machine, from 0: the number of its GPU.
    pub local: usize,
    /// Where process 0 listens, `host:port`.
    pub address: String,
}

impl Place {
    /// This process's place, from environment variables; `get` reads one by its name. None if they
    /// name no place.
    ///
    /// They are those that torchrun sets (`RANK`, `WORLD_SIZE`, `LOCAL_RANK`) or, with
    /// `MASTER_ADDR`, those of SLURM (`SLURM_PROCID`, `SLURM_NTASKS`, `SLURM_LOCALID`). Process 0
    /// listens at the host `MASTER_ADDR`, by default this machine if it is alone, and at the port
    /// `PRISM_PORT`, otherwise `MASTER_PORT` (the next one if torchrun listens there itself),
    /// otherwise 29500.
    ///
    /// # Errors
    /// A variable is missing, is no number, or does not fit the others; the message names it.
    pub fn from_variables(get: impl Fn(&str) -> Option<String>) -> Result<Option<Place>, String> {
        let number = |name: &str| -> Result<Option<usize>, String> {
            get(name)
                .map(|v| v.trim().parse().map_err(|_| format!("{name}={v}: expected a number")))
                .transpose()
        };
        let [rank, world, local] = if get("RANK").is_some() || get("WORLD_SIZE").is_some() {
            ["RANK", "WORLD_SIZE", "LOCAL_RANK"]
        } else if get("SLURM_PROCID").is_some() && get("MASTER_ADDR").is_some() {
            ["SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"]
        } else {
            return Ok(None);
        };
        let need = |name: &str| {
            number(name)?
                .ok_or_else(|| format!("{name} is not set: expected both {rank} and {world}"))
        };
        let (r, w) = (need(rank)?, need(world)?);
        if r >= w {
            return Err(format!("{rank}={r}: expected less than {world}={w}"));
        }
        let port = |name: &str| -> Result<Option<u16>, String> {
            get(name)
                .map(|v| v.trim().parse().map_err(|_| format!("{name}={v}: expected a port")))
                .transpose()
        };
        let port = match (port("PRISM_PORT")?, port("MASTER_PORT")?) {
            (Some(own), _) => own,
            // At that port torchrun itself listens.
            (None, Some(master))
                if get("TORCHELASTIC_USE_AGENT_STORE").is_some_and(|v| v == "True") =>
            {
                master.checked_add(1).unwrap_or(PORT)
            }
            (None, master) => master.unwrap_or(PORT),
        };
        let host = match get("MASTER_ADDR") {
            Some(host) => host,
            None if w == 1 => "127.0.0.1".into(),
            None => {
                return Err(format!(
                    "MASTER_ADDR is not set: expected the host of process 0 of {w}"
                ));
            }
        };
        Ok(Some(Place {
            rank: r,
            world: w,
            local: number(local)?.unwrap_or(0),
            address: format!("{host}:{port}"),
        }))
    }

    /// Checks that processes may meet here with this token, or without one.
    ///
    /// # Errors
    /// No token is given, although there are several processes that meet at an address other than
    /// those of the loopback interface.
    pub fn check(&self, token: Option<&Token>) -> Result<(), String> {
        let is_local = || {
            resolve(&self.address, Instant::now() + PATIENCE)
                .is_ok_and(|list| list.iter().all(|to| to.ip().is_loopback()))
        };
        if self.world == 1 || token.is_some() || is_local() {
            return Ok(());
        }
        Err(format!(
            "{}: processes that meet there need the same secret token, for example from 'openssl rand -hex 32': give it by {WAYS}",
            self.address
        ))
    }
}

/// The processes that train together, as one of them sees them: the connections between them.
///
/// Methods that exchange something must be called by all processes, in the same order.
pub struct Peers {
    rank: usize,
    world: usize,
    /// The connections to the other processes, if there are any.
    wire: Option<Mutex<Wire>>,
    /// Whether gradients are added by NCCL.
    grouped: bool,
}

impl Peers {
    /// This process alone: sums are its own values.
    pub fn alone() -> Peers {
        Peers { rank: 0, world: 1, wire: None, grouped: false }
    }

    /// Meets the other processes; waits for them, for at most five minutes.
    ///
    /// All must bring the same `run`, a description of what they are about to do, and the same
    /// token; see [`Place::check`] for where they need one. Any other caller is turned away and
    /// named on standard error. On GPUs they [`join`](Peers::join) next.
    ///
    /// # Errors
    /// A process does not come, or is of another run; a token is missing or wrong; or process 0
    /// cannot listen.
    pub fn meet(place: &Place, run: &str, token: Option<&Token>) -> Result<Peers, String> {
        place.check(token)?;
        let listener = if place.rank == 0 && place.world > 1 {
            let fail = |e| {
                format!(
                    "{}: cannot listen for the other {} processes: {e}",
                    place.address,
                    place.world - 1
                )
            };
            let list = resolve(&place.address, Instant::now() + PATIENCE).map_err(fail)?;
            Some(TcpListener::bind(&list[..]).map_err(fail)?)
        } else {
            None
        };
        let terms = Terms {
            token: token.cloned().unwrap_or_else(Token::none),
            digest: *blake3::hash(run.as_bytes()).as_bytes(),
            world: place.world,
            patience: PATIENCE,
            greeting: GREETING,
            silence: SILENCE,
            strangers: STRANGERS,
        };
        let warn = |text: &str| {
            let _ = writeln!(std::io::stderr(), "warning: {}", crate::message::shown(text));
        };
        Peers::meet_at(place, listener, &terms, &warn)
    }

    fn meet_at(
        place: &Place,
        listener: Option<TcpListener>,
        terms: &Terms,
        warn: &dyn Fn(&str),
    ) -> Result<Peers, String> {
        let mut peers = Peers { rank: place.rank, world: place.world, ..Peers::alone() };
        if place.world > 1 {
            let mut wire = Wire::new(place.rank, place.world, terms.silence);
            let met = match &listener {
                Some(listener) => gather(&mut wire, listener, terms, warn),
                None => call(&place.address, place.rank, terms).and_then(|stream| {
                    wire.add(0, stream).map_err(|e| format!("{}: {e}", place.address))
                }),
            };
            if let Err(why) = met {
                // Those that came are told.
                wire.shared.lose(&why);
                return Err(why);
            }
            peers.wire = Some(Mutex::new(wire));
        }
        Ok(peers)
    }

    /// Checks that all processes have the same kind of device, which multiplies in the same
    /// precision. On GPUs they then form an NCCL group; a single process does if NCCL is there.
    ///
    /// # Errors
    /// This process, or another one, has another device than process 0; a process is lost; or NCCL
    /// fails. The caller tells the others by [`Peers::ended`].
    pub fn join(&mut self, device: &Device) -> Result<(), String> {
        let (gpu, emulated) = (matches!(device, Device::Cuda(_)), device.is_emulated());
        // Before the group: to a process without a GPU what forms it would make no sense.
        self.compare(
            &format!("{gpu} {emulated} {}", device.products()),
            "the device, or its precision, is not that of process 0",
        )?;
        match device {
            Device::Cuda(cuda) if cuda.has_groups(self.world > 1) => self.form_group(cuda),
            _ => Ok(()),
        }
    }

    fn form_group(&mut self, cuda: &Cuda) -> Result<(), String> {
        let fail = |e: crate::device::CudaError| format!("NCCL: {e}");
        if let Some(wire) = &self.wire {
            // NCCL waits for a lost process for ever.
            let cuda = cuda.clone();
            locked(wire).shared.rescue_by(Box::new(move || cuda.leave_group()));
        }
        let mut id = if self.rank == 0 { cuda.group_id().map_err(fail)? } else { vec![0; 128] };
        self.broadcast(&mut id)?;
        cuda.join_group(&id, self.rank, self.world).map_err(fail)?;
        self.grouped = true;
        Ok(())
    }

    /// Checks that no process is lost; returns at once.
    ///
    /// # Errors
    /// One is: the message is the reason. The run cannot go on.
    pub fn intact(&self) -> Result<(), String> {
        self.wire.as_ref().and_then(|wire| locked(wire).shared.lost()).map_or(Ok(()), Err)
    }

    /// Checks that all processes bring the same `run`, a description of what they are about to do
    /// that is longer than the one by which they met: of a state that they have read since.
    ///
    /// # Errors
    /// This process, or another one, brings another than process 0; or a process is lost.
    pub fn agree(&self, run: &str) -> Result<(), String> {
        self.compare(run, "the settings, or the state to resume, are not those of process 0")
    }

    /// Checks that all processes bring the same text as process 0; `other` is the error of one that
    /// does not.
    fn compare(&self, text: &str, other: &str) -> Result<(), String> {
        let mine = *blake3::hash(text.as_bytes()).as_bytes();
        let mut first = mine;
        self.broadcast(&mut first)?;
        if first != mine {
            return Err(other.into());
        }
        // A process that brings another ends instead, and tells the others.
        self.sum(&mut [0.0f64])
    }

    /// Tells the others that this process ends because of an error, `why`, and returns the reason
    /// to report: an earlier loss of another process, if there was one, because the error follows
    /// from it, otherwise `why`.
    pub fn ended(&self, why: String) -> String {
        let Some(wire) = &self.wire else { return why };
        let wire = locked(wire);
        if let Some(lost) = wire.shared.lost() {
            return lost;
        }
        wire.shared.lose(&format!("process {} of this training run ended: {why}", self.rank));
        why
    }

    /// The number of this process, from 0. Process 0 writes files.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// The number of processes.
    pub fn world(&self) -> usize {
        self.world
    }

    /// The items of a batch that belong to this process: a part of `0..batch`, of nearly the same
    /// length in every process.
    pub fn share(&self, batch: usize) -> Range<usize> {
        self.rank * batch / self.world..(self.rank + 1) * batch / self.world
    }

    /// The GPU whose group adds up gradients by NCCL; none if they are added over TCP.
    pub fn group<'d>(&self, device: &'d Device) -> Option<&'d Cuda> {
        match device {
            Device::Cuda(cuda) if self.grouped => Some(cuda),
            _ => None,
        }
    }

    /// Adds up the `values` of all processes, which become the sum in every process, with the same
    /// bits. Waits for the others as long as they give signs of life.
    ///
    /// # Errors
    /// Another process is lost, or has another number of values.
    pub fn sum<T: bytemuck::Pod + std::ops::AddAssign>(
        &self,
        values: &mut [T],
    ) -> Result<(), String> {
        let Some(wire) = &self.wire else { return Ok(()) };
        let wire = locked(wire);
        if self.rank > 0 {
            wire.send(bytemuck::cast_slice(values))?;
            return wire.receive(0, bytemuck::cast_slice_mut(values));
        }
        let mut theirs = memory::copied(MESSAGE, values);
        for rank in 1..self.world {
            wire.receive(rank, bytemuck::cast_slice_mut(&mut theirs))?;
            values.iter_mut().zip(&theirs).for_each(|(v, t)| *v += *t);
        }
        wire.send(bytemuck::cast_slice(values))
    }

    /// Gives all processes process 0's bytes.
    fn broadcast(&self, bytes: &mut [u8]) -> Result<(), String> {
        match &self.wire {
            None => Ok(()),
            Some(wire) if self.rank == 0 => locked(wire).send(bytes),
            Some(wire) => locked(wire).receive(0, bytes),
        }
    }
}

/// An error for hooks of ops.
pub(crate) fn op_error(message: String) -> OpError {
    OpError::Argument { op: "sum of gradients", message }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(vars: &[(&str, &str)]) -> Result<Option<Place>, String> {
        Place::from_variables(|name| {
            vars.iter().find(|(n, _)| *n == name).map(|(_, v)| v.to_string())
        })
    }

    #[test]
    fn places_come_from_torchrun_or_slurm() {
        assert_eq!(place(&[]), Ok(None));
        let torchrun = [
            ("RANK", "3"),
            ("WORLD_SIZE", "8"),
            ("LOCAL_RANK", "1"),
            ("MASTER_ADDR", "node7"),
            ("MASTER_PORT", "1234"),
        ];
        let expected = Place { rank: 3, world: 8, local: 1, address: "node7:1234".into() };
        assert_eq!(place(&torchrun), Ok(Some(expected.clone())));
        let slurm = [
            ("SLURM_PROCID", "3"),
            ("SLURM_NTASKS", "8"),
            ("SLURM_LOCALID", "1"),
            ("MASTER_ADDR", "node7"),
        ];
        assert_eq!(place(&slurm), Ok(Some(Place { address: "node7:29500".into(), ..expected })));
        let listening = [&torchrun[..], &[("TORCHELASTIC_USE_AGENT_STORE", "True")]].concat();
        assert_eq!(place(&listening).unwrap().unwrap().address, "node7:1235");
        let own = [&listening[..], &[("PRISM_PORT", "99")]].concat();
        assert_eq!(place(&own).unwrap().unwrap().address, "node7:99");
        // A batch script's own process has SLURM's variables too.
        assert_eq!(place(&slurm[..3]), Ok(None));
        assert_eq!(
            place(&[("RANK", "0"), ("WORLD_SIZE", "1")]).unwrap().unwrap().address,
            "127.0.0.1:29500"
        );
        for (vars, said) in [
            (&[("RANK", "0")][..], "WORLD_SIZE is not set"),
            (
                &[("RANK", "2"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "a")],
                "RANK=2: expected less than WORLD_SIZE=2",
            ),
            (&[("RANK", "x"), ("WORLD_SIZE", "2")], "RANK=x: expected a number"),
            (&[("RANK", "0"), ("WORLD_SIZE", "2")], "MASTER_ADDR is not set"),
        ] {
            let error = place(vars).unwrap_err();
            assert!(error.contains(said), "{error}");
        }
    }

    fn listening() -> (TcpListener, String) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        (listener, address)
    }

    /// Terms with time limits that are longer than anything here takes.
    fn terms(world: usize, run: &str) -> Terms {
        let long = Duration::from_secs(300);
        let digest = *blake3::hash(run.as_bytes()).as_bytes();
        Terms {
            token: Token::none(),
            digest,
            world,
            patience: long,
            greeting: long,
            silence: long,
            strangers: 64,
        }
    }

    fn meet(
        listener: Option<TcpListener>,
        address: &str,
        rank: usize,
        terms: &Terms,
    ) -> Result<Peers, String> {
        let place = Place { rank, world: terms.world, local: rank, address: address.into() };
        Peers::meet_at(&place, listener, terms, &|_: &str| {})
    }

    /// Peers in threads, each doing `work`.
    fn together_at<R: Send>(
        (listener, address): (TcpListener, String),
        world: usize,
        terms: impl Fn(usize) -> Terms + Sync,
        work: impl Fn(Result<Peers, String>) -> R + Sync,
    ) -> Vec<R> {
        let mut listener = Some(listener);
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..world)
                .map(|rank| {
                    let (address, terms, work) = (&address, &terms, &work);
                    let listener = if rank == 0 { listener.take() } else { None };
                    scope.spawn(move || work(meet(listener, address, rank, &terms(rank))))
                })
                .collect();
            threads.into_iter().map(|t| t.join().unwrap()).collect()
        })
    }

    fn together<R: Send>(
        world: usize,
        terms: impl Fn(usize) -> Terms + Sync,
        work: impl Fn(Result<Peers, String>) -> R + Sync,
    ) -> Vec<R> {
        together_at(listening(), world, terms, work)
    }

    #[test]
    fn sums_are_everybodys() {
        let sums = together(
            3,
            |_| terms(3, "same"),
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
                let shares =
                    (0..world).map(|rank| Peers { rank, world, ..Peers::alone() }.share(batch));
                let items: Vec<usize> =
                    shares.inspect(|s| assert!(!s.is_empty())).flatten().collect();
                assert_eq!(items, (0..batch).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn other_settings_are_refused_by_both_sides() {
        let said = together(
            2,
            |rank| terms(2, &format!("learning rate {rank}")),
            |peers| peers.err().unwrap(),
        );
        assert!(
            said[0].contains("process 1 has other settings")
                && said[1].contains("process 0 has other settings"),
            "{said:?}"
        );
    }

    #[test]
    fn what_was_read_after_meeting_is_compared() {
        let why = "the settings, or the state to resume, are not those of process 0";
        let told = format!("process 2 of this training run ended: {why}");
        for (others, expected) in [(["a", "a"], [""; 3]), (["a", "b"], [&*told, &*told, why])] {
            let said = together(
                3,
                |_| terms(3, "same"),
                |peers| {
                    let peers = peers.unwrap();
                    // After a sum all have met.
                    peers.sum(&mut [0.0f64]).unwrap();
                    let run = ["a", others[0], others[1]][peers.rank()];
                    peers.agree(run).map_err(|why| peers.ended(why)).err().unwrap_or_default()
                },
            );
            assert_eq!(said, expected);
        }
    }

    #[test]
    fn a_process_that_leaves_is_named() {
        let said = together(
            2,
            |_| terms(2, "same"),
            |peers| {
                let peers = peers.unwrap();
                if peers.rank() == 1 {
                    String::new()
                } else {
                    peers.sum(&mut [0.0f64]).unwrap_err()
                }
            },
        );
        assert!(said[0].contains("process 1 of this training run was lost"), "{said:?}");
    }

    #[test]
    fn a_process_that_fails_tells_all_others_why() {
        let said = together(
            3,
            |_| terms(3, "same"),
            |peers| {
                let peers = peers.unwrap();
                let sum = || peers.sum(&mut [0.0f64]);
                match peers.rank() {
                    // After a sum all have met: one that came later would find no process 0.
                    1 => sum().map(|()| peers.ended("its disk is full".into())).unwrap(),
                    _ => sum().and_then(|()| sum()).unwrap_err(),
                }
            },
        );
        let told = "process 1 of this training run ended: its disk is full";
        assert_eq!(said, [told, "its disk is full", told]);
    }

    /// NCCL itself needs GPUs: the emulator counts how often it would have been told.
    #[cfg(feature = "emulator")]
    #[test]
    fn a_loss_has_every_process_leave_the_group_of_gpus_once() {
        use crate::device::{Cpu, DType};
        use std::sync::atomic::Ordering;
        for fails in [true, false] {
            let (listener, address) = listening();
            let work = |rank: usize, listener: Option<TcpListener>| {
                let cuda = Cuda::emulated(Cpu::new(1).unwrap(), DType::F16, 0);
                let left = cuda.pretend_groups();
                let count = || left.load(Ordering::Relaxed);
                let device = Device::Cuda(cuda);
                let mut peers = meet(listener, &address, rank, &terms(3, "same")).unwrap();
                peers.join(&device).unwrap();
                assert!(peers.group(&device).is_some() && count() == 0);
                // After a sum all have met.
                let sum = || peers.sum(&mut [0.0f64]);
                let said = match (fails, rank) {
                    (false, _) => sum().map(|()| String::new()).unwrap(),
                    (true, 1) => sum().map(|()| peers.ended("its GPU is gone".into())).unwrap(),
                    (true, _) => sum().and_then(|()| sum()).unwrap_err(),
                };
                // The thread that reads leaves the group after it has told of the loss.
                for _ in 0..30_000 {
                    if !fails || count() > 0 {
                        break;
                    }
                    std::thread::sleep(Duration::from_millis(10));
                }
                if fails {
                    peers.ended("an error that follows from it".into());
                }
                drop(peers);
                (said, count())
            };
            let ended = std::thread::scope(|scope| {
                let work = &work;
                let first = scope.spawn(move || work(0, Some(listener)));
                let others = [1, 2].map(|rank| scope.spawn(move || work(rank, None)));
                let [one, two] = others.map(|thread| thread.join().unwrap());
                [first.join().unwrap(), one, two]
            });
            let told = "process 1 of this training run ended: its GPU is gone";
            let expected = match fails {
                true => [(told, 1), ("its GPU is gone", 1), (told, 1)],
                false => [("", 0); 3],
            };
            assert_eq!(ended, expected.map(|(said, left)| (said.to_string(), left)));
        }
    }

    /// A process on a GPU would send one on the CPU what forms NCCL's group.
    #[cfg(feature = "emulator")]
    #[test]
    fn another_device_is_refused_before_a_group_is_formed() {
        use crate::device::{Cpu, DType};
        let why = "the device, or its precision, is not that of process 0";
        let said = together(
            2,
            |_| terms(2, "same"),
            |peers| {
                let mut peers = peers.unwrap();
                let device = if peers.rank() == 0 {
                    let cuda = Cuda::emulated(Cpu::new(1).unwrap(), DType::F16, 0);
                    cuda.pretend_groups();
                    Device::Cuda(cuda)
                } else {
                    Device::open("cpu", 1).unwrap()
                };
                let joined = peers.join(&device);
                joined.map_err(|why| peers.ended(why)).err().unwrap_or_default()
            },
        );
        assert_eq!(said, [format!("process 1 of this training run ended: {why}"), why.into()]);
    }

    #[test]
    fn strangers_neither_end_a_run_nor_hold_it_up() {
        let (listener, address) = listening();
        let connect = || std::net::TcpStream::connect(&address).unwrap();
        let hello =
            [&b"prism\0\0\x02"[..], &1u64.to_le_bytes(), &2u64.to_le_bytes(), &[7; 32]].concat();
        let http = b"GET / HTTP/1.0\r\n\r\n".to_vec();
        let unproven = [&hello[..], &[0; 64]].concat();
        let said = [vec![], http, vec![b'X'; 40], hello[..20].to_vec(), unproven];
        let held = said.map(|bytes| {
            let mut stranger = connect();
            stranger.write_all(&bytes).unwrap();
            stranger
        });
        connect().write_all(&hello[..3]).unwrap();
        let mut slow = connect();
        let trickle = std::thread::spawn(move || {
            // Ends when the connection is dropped, and otherwise long after the others have given
            // up.
            for byte in hello {
                if slow.write_all(&[byte]).is_err() {
                    break;
                }
                std::thread::sleep(Duration::from_millis(50));
            }
        });
        // A process that waits for a stranger to finish does not meet the others in time.
        let terms = |_| Terms { greeting: Duration::from_secs(600), ..terms(2, "same") };
        let sums = together_at((listener, address.clone()), 2, terms, |peers| {
            let (peers, mut values) = (peers.unwrap(), [1.0f64]);
            peers.sum(&mut values).unwrap();
            values
        });
        assert_eq!(sums, [[2.0]; 2]);
        drop(held);
        trickle.join().unwrap();
    }

    /// Tries with longer and longer limits for signs of life, in seconds: a machine with much to do
    /// may pause a process that lives for longer than the shorter ones.
    fn with_some_silence(try_it: impl Fn(u64) -> Result<(), String>) {
        let failures: Vec<String> =
            [2, 8, 32, 128].into_iter().map_while(|seconds| try_it(seconds).err()).collect();
        assert!(failures.len() < 4, "{failures:?}");
    }

    #[test]
    fn a_process_that_gives_no_sign_of_life_ends_the_others_and_is_named() {
        with_some_silence(|seconds| {
            let (listener, address) = listening();
            let terms = Terms { silence: Duration::from_secs(seconds), ..terms(3, "same") };
            let said = std::thread::scope(|scope| {
                let sum = |peers: Peers| peers.sum(&mut [0.0f64]);
                let (address, terms) = (&address, &terms);
                let first =
                    scope.spawn(move || meet(Some(listener), address, 0, terms).and_then(sum));
                let other = meet(None, address, 2, terms);
                // Its connection stays, as that of a stopped process does.
                let stopped = other.is_ok().then(|| call(address, 1, terms));
                let said = [other.and_then(sum), first.join().unwrap()];
                drop(stopped);
                said
            });
            let start = "process 1 of this training run was lost";
            let expected = format!("{start} (it sent nothing for {seconds} s");
            let is_named = |said: &Result<(), String>| {
                let why = said.as_ref().err();
                why.is_some_and(|why| why.starts_with(&expected) && why.contains("--resume"))
            };
            if said.iter().all(is_named) { Ok(()) } else { Err(format!("{said:?}")) }
        });
    }

    #[test]
    fn a_process_that_computes_for_long_is_waited_for() {
        with_some_silence(|seconds| {
            let silence = Duration::from_secs(seconds);
            let sums = together(
                2,
                |_| Terms { silence, ..terms(2, "same") },
                |peers| {
                    let (peers, mut values) = (peers?, [1.0f64]);
                    if peers.rank() == 1 {
                        std::thread::sleep(silence * 2);
                    }
                    peers.sum(&mut values)?;
                    peers.intact().map(|()| values)
                },
            );
            let sums: Vec<[f64; 1]> = sums.into_iter().collect::<Result<_, String>>()?;
            assert_eq!(sums, [[2.0]; 2]);
            Ok(())
        });
    }

    #[test]
    fn processes_that_meet_over_a_network_need_a_token() {
        let at = |address: &str, world: usize| Place {
            rank: 0,
            world,
            local: 0,
            address: address.into(),
        };
        let token = Token::new("a secret").unwrap();
        for local in ["127.0.0.1:1", "[::1]:1", "127.0.1.1:1"] {
            at(local, 2).check(None).unwrap();
        }
        at("0.0.0.0:0", 1).check(None).unwrap();
        at("0.0.0.0:0", 2).check(Some(&token)).unwrap();
        let error = Peers::meet(&at("0.0.0.0:0", 2), "a run", None).err().unwrap();
        assert!(
            error.contains("0.0.0.0:0")
                && error.contains("PRISM_TOKEN")
                && error.contains("--token-file"),
            "{error}"
        );
    }
}
