//! The routes, and what each does.

use std::sync::Arc;

use serde::Serialize;
use serde_json::{Map, Value};

#[cfg(test)]
use super::model::AttachRequest;
use super::model::{CheckpointRequest, Jobs, ResizeRequest, SetRequest, Stats, Volumes};
use super::{Kind, Refused};
use crate::control::config::{CacheConfig, VolumeConfig};
use crate::control::daemon::{Change, Daemon, DaemonError, Dirty, HOLD_DEFAULT_S, HOLD_MAX_S};
use crate::control::file;
use crate::control::metrics;
use crate::control::value;

/// What is answered.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Reply {
    /// HTTP status.
    pub status: u16,
    /// Media type.
    pub content_type: &'static str,
    /// The body.
    pub body: Vec<u8>,
}

impl Reply {
    /// A value as JSON.
    pub fn json(status: u16, value: &impl Serialize) -> Self {
        // Our own structs: maps have text for keys, and numbers are finite.
        let body = serde_json::to_vec(value).expect("a value of the model is JSON");
        Self { status, content_type: "application/json", body }
    }
}

/// A request, taken apart.
pub struct Call<'a> {
    /// What stood for the `{…}` of the path, in order.
    pub names: Vec<&'a str>,
    /// Behind the question mark, empty without one.
    pub query: &'a str,
    /// The body, whole.
    pub body: &'a [u8],
}

impl Call<'_> {
    /// The value of a query parameter; `known` are all there may be.
    fn parameter(&self, name: &str, known: &[&str]) -> Result<Option<&str>, Refused> {
        let mut found = None;
        for pair in self.query.split('&').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            if !known.contains(&key) {
                let known = known.join(", ");
                return Err(bad(&format!("there is no parameter `{key}` here: it takes {known}")));
            }
            if key == name {
                found = Some(value);
            }
        }
        Ok(found)
    }
}

/// The body a route takes or gives.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Body {
    /// None.
    Nothing,
    /// JSON of the struct of this name in `model`.
    Json(&'static str),
    /// Text of this media type.
    Text(&'static str),
}

type Handler = fn(&Arc<Daemon>, &Call<'_>) -> Result<Reply, Refused>;

/// One thing that can be asked.
pub struct Route {
    /// HTTP method.
    pub method: &'static str,
    /// Path; `{…}` stands for a name.
    pub path: &'static str,
    /// What it is for, one line.
    pub summary: &'static str,
    /// Query parameters: name, what it may be (a number if nothing is named), what it means.
    pub parameters: &'static [(&'static str, &'static [&'static str], &'static str)],
    /// What it takes.
    pub takes: Body,
    /// Status of success.
    pub status: u16,
    /// What it gives.
    pub gives: Body,
    handler: Handler,
}

const METRICS_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

const CHECKPOINT: &str = "/v1/volumes/{volume}/checkpoint";
const CHECKPOINT_JOB: &[(&str, &[&str], &str)] =
    &[("job", &[], "Only if it is the checkpoint that this job began")];

/// All of it.
pub const ROUTES: &[Route] = &[
    get("/v1/status", "The daemon, its caches and its volumes", "DaemonStatus", |daemon, _| {
        Ok(Reply::json(200, &daemon.view()))
    }),
    get("/v1/volumes", "All volumes on the daemon's caches, served or not", "Volumes", |daemon, _| {
        Ok(Reply::json(200, &Volumes { volumes: daemon.view_volumes() }))
    }),
    Route {
        takes: Body::Json("AttachRequest"),
        ..job("POST", "/v1/volumes", "Serve one more volume", attach)
    },
    get("/v1/volumes/{volume}", "All about a volume that is served", "VolumeStatus", |daemon, call| {
        let served = daemon.find(call.names[0])?;
        Ok(Reply::json(200, &daemon.view_volume(&served)))
    }),
    Route {
        takes: Body::Json("SetRequest"),
        ..job(
            "PATCH",
            "/v1/volumes/{volume}",
            "Change how a volume is cached and written back, while it is used",
            set,
        )
    },
    Route {
        parameters: &[
            (
                "dirty",
                &["drain", "keep", "discard"],
                "What becomes of data that is not on the disk yet; `discard` also deletes the volume from its cache",
            ),
            ("force", &["true", "false"], "Whether also while a VM is connected"),
        ],
        ..job("DELETE", "/v1/volumes/{volume}", "Stop serving a volume", detach)
    },
    job(
        "POST",
        "/v1/volumes/{volume}/flush",
        "Bring to the disk everything acknowledged before this request",
        |daemon, call| flush(daemon, call, "flush"),
    ),
    job(
        "POST",
        "/v1/volumes/{volume}/drain",
        "The same, before the cache is taken away: says whether anything is dirty afterwards",
        |daemon, call| flush(daemon, call, "drain"),
    ),
    Route {
        takes: Body::Json("ResizeRequest"),
        ..job(
            "POST",
            "/v1/volumes/{volume}/resize",
            "Make a volume larger while it is used, and tell its VM",
            resize,
        )
    },
    Route {
        takes: Body::Json("CheckpointRequest"),
        ..job(
            "POST",
            CHECKPOINT,
            "Bring to the disk everything acknowledged before, then keep it still; done when that is reached",
            checkpoint,
        )
    },
    Route {
        method: "PUT",
        parameters: CHECKPOINT_JOB,
        ..get(CHECKPOINT, "Prolong a checkpoint that is held, from now", "Checkpoint", |daemon, call| {
            Ok(Reply::json(200, &daemon.prolong_checkpoint(call.names[0], checkpoint_job(call)?)?))
        })
    },
    Route {
        method: "DELETE",
        parameters: CHECKPOINT_JOB,
        ..get(CHECKPOINT, "End a checkpoint: write-back goes on", "Checkpoint", |daemon, call| {
            Ok(Reply::json(200, &daemon.end_checkpoint(call.names[0], checkpoint_job(call)?)?))
        })
    },
    get("/v1/stats", "Counters and rates of all volumes that are served", "Stats", |daemon, _| {
        let volumes = daemon.served().iter().map(|served| daemon.view_stats(served, false)).collect();
        Ok(Reply::json(200, &Stats { volumes }))
    }),
    get("/v1/volumes/{volume}/stats", "Counters and rates of a volume", "VolumeStats", |daemon, call| {
        let served = daemon.find(call.names[0])?;
        Ok(Reply::json(200, &daemon.view_stats(&served, false)))
    }),
    Route {
        method: "POST",
        ..get(
            "/v1/volumes/{volume}/stats/reset",
            "Counters of a volume up to now; the view in `stats` then begins at zero",
            "VolumeStats",
            |daemon, call| {
                let served = daemon.find(call.names[0])?;
                Ok(Reply::json(200, &daemon.view_stats(&served, true)))
            },
        )
    },
    get("/v1/jobs", "All jobs that run, and the last that ended", "Jobs", |daemon, _| {
        Ok(Reply::json(200, &Jobs { jobs: daemon.jobs().view() }))
    }),
    get("/v1/jobs/{job}", "How far a job is, or how it ended", "Job", |daemon, call| {
        Ok(Reply::json(200, &daemon.jobs().find(number(call)?)?.view()))
    }),
    Route {
        method: "DELETE",
        ..get("/v1/jobs/{job}", "Call a job off", "Job", |daemon, call| {
            Ok(Reply::json(200, &daemon.jobs().cancel(number(call)?)?))
        })
    },
    Route {
        method: "POST",
        ..get("/v1/reload", "Read the configuration file again", "ReloadReport", |daemon, _| {
            Ok(Reply::json(200, &daemon.reload()?))
        })
    },
    Route {
        gives: Body::Text("application/json"),
        ..get("/v1/openapi.json", "This document", "", |_, _| {
            let body = include_bytes!("../../../docs/openapi.json").to_vec();
            Ok(Reply { status: 200, content_type: "application/json", body })
        })
    },
    Route {
        gives: Body::Text(METRICS_TYPE),
        ..get("/metrics", "All counters, as Prometheus reads them", "", |daemon, _| {
            let body = metrics::text(daemon).into_bytes();
            Ok(Reply { status: 200, content_type: METRICS_TYPE, body })
        })
    },
];

const fn get(path: &'static str, summary: &'static str, gives: &'static str, handler: Handler) -> Route {
    let gives = Body::Json(gives);
    Route { method: "GET", path, summary, parameters: &[], takes: Body::Nothing, status: 200, gives, handler }
}

const fn job(method: &'static str, path: &'static str, summary: &'static str, handler: Handler) -> Route {
    Route { method, status: 202, ..get(path, summary, "Job", handler) }
}

/// Does what a request asks for.
pub fn dispatch(daemon: &Arc<Daemon>, method: &str, path: &str, query: &str, body: &[u8]) -> Reply {
    let mut here = ROUTES.iter().filter_map(|route| Some((route, names(route.path, path)?))).peekable();
    if here.peek().is_none() {
        return Refused::new(Kind::NotFound, &format!("there is nothing at {path}")).reply();
    }
    // HEAD is GET whose body the server leaves out (RFC 9110 §9.3.2).
    let wanted = if method == "HEAD" { "GET" } else { method };
    let Some((route, names)) = here.find(|(route, _)| route.method == wanted) else {
        return Refused::new(Kind::NotAllowed, &format!("{path} does not take {method}")).reply();
    };
    if route.takes == Body::Nothing && !body.is_empty() {
        return bad("this request takes no body").reply();
    }
    (route.handler)(daemon, &Call { names, query, body }).unwrap_or_else(|refused| refused.reply())
}

/// What stands for the names of a route's path, `None` if it is another path.
fn names<'a>(template: &str, path: &'a str) -> Option<Vec<&'a str>> {
    let mut names = Vec::new();
    let (mut wanted, mut given) = (template.split('/'), path.split('/'));
    loop {
        match (wanted.next(), given.next()) {
            (None, None) => return Some(names),
            (Some(wanted), Some(given)) if wanted.starts_with('{') && !given.is_empty() => names.push(given),
            (Some(wanted), Some(given)) if wanted == given => {}
            _ => return None,
        }
    }
}

fn bad(why: &str) -> Refused {
    Refused::new(Kind::BadRequest, &why)
}

fn number(call: &Call<'_>) -> Result<u64, Refused> {
    call.names[0].parse().map_err(|_| bad(&format!("`{}` is not the number of a job", call.names[0])))
}

fn object(body: &[u8]) -> Result<Map<String, Value>, Refused> {
    match serde_json::from_slice(body) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(_) => Err(bad("the body is not a JSON object")),
        Err(error) => Err(bad(&format!("the body is not JSON: {error}"))),
    }
}

fn attach(daemon: &Arc<Daemon>, call: &Call<'_>) -> Result<Reply, Refused> {
    let caches: Vec<CacheConfig> = daemon.caches().iter().map(|cache| cache.config.clone()).collect();
    let config = attach_config(object(call.body)?, &caches)?;
    Ok(Reply::json(202, &daemon.start_attach(config)?))
}

/// The volume that a request describes. Its keys are read by the very reader of the configuration
/// file, so they are refused, and the nearest known one is named, in the same words.
pub(super) fn attach_config(
    mut keys: Map<String, Value>,
    caches: &[CacheConfig],
) -> Result<VolumeConfig, Refused> {
    let mut consent = |key: &str| match keys.remove(key) {
        None => Ok(false),
        Some(Value::Bool(given)) => Ok(given),
        Some(_) => Err(bad(&format!("`{key}` must be true or false"))),
    };
    let (force_identity, accept_loss) = (consent("force_identity")?, consent("accept_loss")?);
    // TOML knows no null: what is null is not there.
    keys.retain(|_, value| !value.is_null());
    let text = toml::to_string(&keys).map_err(|_| bad("the body has values that no key takes"))?;
    let mut config = file::parse_volume(&text, caches).map_err(|why| bad(&why.to_string()))?;
    (config.force_identity, config.accept_loss) = (force_identity, accept_loss);
    Ok(config)
}

fn set(daemon: &Arc<Daemon>, call: &Call<'_>) -> Result<Reply, Refused> {
    let request: SetRequest =
        serde_json::from_slice(call.body).map_err(|error| bad(&format!("the body is not this: {error}")))?;
    Ok(Reply::json(202, &daemon.start_set(call.names[0], change(&request)?)?))
}

/// What a request asks for, in the words of the configuration file.
fn change(request: &SetRequest) -> Result<Change, Refused> {
    fn read<T>(
        key: &str,
        given: Option<String>,
        parse: impl Fn(&str) -> Result<T, value::ValueError>,
    ) -> Result<Option<T>, Refused> {
        let parsed = given.map(|text| parse(&text)).transpose();
        parsed.map_err(|why| bad(&format!("`{key}`: {why}")))
    }
    let number = |given: Option<u32>| given.map(|number| number.to_string());
    let change = Change {
        mode: read("mode", request.mode.clone(), value::choice)?,
        order: read("order", request.order.clone(), value::choice)?,
        max_lag_s: read("max_lag_s", number(request.max_lag_s), value::max_lag_s_or_none)?,
        max_dirty: read("max_dirty", request.max_dirty.clone(), value::max_dirty_or_none)?,
        on_backing_error: read("on_backing_error", request.on_backing_error.clone(), value::choice)?,
        backing_timeout_s: read("backing_timeout_s", number(request.backing_timeout_s), value::timeout_s)?,
    };
    match change == Change::default() {
        true => Err(bad("the body says nothing to change")),
        false => Ok(change),
    }
}

fn resize(daemon: &Arc<Daemon>, call: &Call<'_>) -> Result<Reply, Refused> {
    let request: ResizeRequest = match call.body {
        b"" => ResizeRequest::default(),
        body => serde_json::from_slice(body).map_err(|why| bad(&format!("the body is not this: {why}")))?,
    };
    let size = request.size.as_deref().map(value::disk_size).transpose();
    let size = size.map_err(|why| bad(&format!("`size`: {why}")))?;
    Ok(Reply::json(202, &daemon.start_resize(call.names[0], size)?))
}

fn checkpoint(daemon: &Arc<Daemon>, call: &Call<'_>) -> Result<Reply, Refused> {
    let request: CheckpointRequest = match call.body {
        b"" => CheckpointRequest::default(),
        body => serde_json::from_slice(body).map_err(|why| bad(&format!("the body is not this: {why}")))?,
    };
    let hold_s = request.hold_s.unwrap_or(HOLD_DEFAULT_S);
    if !(1..=HOLD_MAX_S).contains(&hold_s) {
        return Err(bad(&format!("`hold_s` is a number from 1 to {HOLD_MAX_S}")));
    }
    Ok(Reply::json(202, &daemon.start_checkpoint(call.names[0], hold_s)?))
}

fn checkpoint_job(call: &Call<'_>) -> Result<Option<u64>, Refused> {
    let given = call.parameter("job", &["job"])?;
    given.map(|job| job.parse().map_err(|_| bad(&format!("`{job}` is not the number of a job")))).transpose()
}

fn detach(daemon: &Arc<Daemon>, call: &Call<'_>) -> Result<Reply, Refused> {
    const KNOWN: &[&str] = &["dirty", "force"];
    let dirty = match call.parameter("dirty", KNOWN)? {
        Some("drain") => Dirty::Drain,
        Some("keep") => Dirty::Keep,
        Some("discard") => Dirty::Discard,
        _ => return Err(bad("say what becomes of dirty data: dirty=drain, dirty=keep or dirty=discard")),
    };
    let force = match call.parameter("force", KNOWN)? {
        None | Some("false") => false,
        Some("true") => true,
        Some(_) => return Err(bad("`force` is true or false")),
    };
    let name = call.names[0].to_owned();
    let (own, volume) = (Arc::clone(daemon), daemon.would_detach(&name, force)?);
    let job = match (volume, dirty) {
        (Some(served), _) => {
            daemon.jobs().start("detach", &name, move |task| own.detach(&served, dirty, task))?
        }
        (None, Dirty::Discard) => {
            let of = name.clone();
            daemon.jobs().start("detach", &name, move |_| own.delete_detached(&of))?
        }
        (None, _) => return Err(DaemonError::NotAttached(name).into()),
    };
    Ok(Reply::json(202, &job))
}

fn flush(daemon: &Arc<Daemon>, call: &Call<'_>, kind: &'static str) -> Result<Reply, Refused> {
    let served = daemon.find(call.names[0])?;
    let job = daemon.jobs().start(kind, call.names[0], move |task| Daemon::flush(&served, task))?;
    Ok(Reply::json(202, &job))
}

/// Everything an [`AttachRequest`] can say, for the test that every key is known to the file as well.
#[cfg(test)]
fn whole_request() -> AttachRequest {
    AttachRequest {
        name: "web".into(),
        cache: Some("pmem".into()),
        socket: "/run/web.sock".into(),
        socket_mode: Some("0660".into()),
        socket_group: Some("kvm".into()),
        backing: "/dev/web".into(),
        backing_format: Some("raw".into()),
        backing_size: Some("1GiB".into()),
        queues: Some(4),
        queue_size: Some(128),
        mode: Some("writearound".into()),
        order: Some("relaxed".into()),
        data_crc: Some(true),
        block_size: Some(4096),
        read_only: Some(true),
        serial: Some("S".into()),
        discard: Some("keep".into()),
        poll_us: Some(7),
        redo: Some("/dev/redo".into()),
        redo_size: Some("32MiB".into()),
        max_lag_s: Some(60),
        max_dirty: Some("1GiB".into()),
        on_backing_error: Some("read_only".into()),
        backing_timeout_s: Some(9),
        sidecar: Some(false),
        admission: Some("second-miss".into()),
        sequential_cutoff: Some("0".into()),
        force_identity: true,
        accept_loss: true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::config::{Admission, Discard, Mode, OnBackingError, Order};
    use crate::tools::image::Sizing;

    fn caches() -> Vec<CacheConfig> {
        vec![CacheConfig {
            name: "pmem".parse().unwrap(),
            path: "/c".into(),
            size: Sizing::AsFound,
            segment_size: None,
            assume_dax: false,
            allow_volatile: false,
            scrub_mib_s: 0,
            scrub_interval_h: 24,
        }]
    }

    fn config(json: Value) -> Result<VolumeConfig, Refused> {
        attach_config(object(json.to_string().as_bytes())?, &caches())
    }

    #[test]
    fn every_key_of_a_request_reaches_its_field() {
        let config = config(serde_json::to_value(whole_request()).unwrap()).unwrap();
        assert_eq!((config.name.as_str(), config.queues, config.queue_size), ("web", 4, 128));
        assert_eq!((config.mode, config.order), (Mode::Writearound, Order::Relaxed));
        assert_eq!((config.discard, config.poll_us, config.block_size), (Discard::Keep, 7, Some(4096)));
        assert!(config.data_crc && config.read_only && config.force_identity && config.accept_loss);
        assert_eq!((config.serial.as_str(), config.backing.raw), ("S", true));
        assert_eq!(config.backing.size, Sizing::Exactly(1 << 30));
        assert_eq!((config.redo, config.redo_size), (Some("/dev/redo".into()), Some(32 << 20)));
        assert_eq!((config.max_lag_s, config.max_dirty), (60, 1 << 30));
        assert_eq!((config.on_backing_error, config.backing_timeout_s), (OnBackingError::ReadOnly, 9));
        assert_eq!((config.sidecar, config.admission), (Some(false), Admission::SecondMiss));
        assert_eq!(config.sequential_cutoff, 0);
    }

    #[test]
    fn a_request_is_refused_in_the_words_of_the_file() {
        let rows = [
            (serde_json::json!({"nmae": "v"}), "unknown key `nmae` in the volume: did you mean `name`?"),
            (serde_json::json!({"name": "v", "socket": "/s"}), "the volume has no `backing`"),
            (serde_json::json!({"name": "v", "queues": "4"}), "`queues` is a string, it must be an integer"),
            (serde_json::json!({"force_identity": 1}), "`force_identity` must be true or false"),
            (serde_json::json!({"name": "a b"}), "`name`: `a b` is not a name"),
            (serde_json::json!({"name": "v", "cache": "x"}), "has no `socket`"),
        ];
        for (json, words) in rows {
            let refused = config(json.clone()).unwrap_err();
            assert_eq!(refused.kind, Kind::BadRequest);
            assert!(refused.message.contains(words), "{json} gave {}", refused.message);
        }
        for body in [&b"[]"[..], b"{", b"", b"\xff", b"{\"name\": }", b"1e999"] {
            assert_eq!(object(body).unwrap_err().kind, Kind::BadRequest);
        }
        // Deep nesting is refused by the reader, not by the end of the stack.
        assert!(object("[".repeat(100_000).as_bytes()).is_err());
    }

    #[test]
    fn a_change_says_at_least_one_thing_and_nothing_impossible() {
        let read = |json: Value| change(&serde_json::from_value(json).unwrap());
        let all = serde_json::json!({
            "mode": "writethrough", "order": "grouped", "max_lag_s": 0, "max_dirty": "0",
            "on_backing_error": "read_only", "backing_timeout_s": 7,
        });
        let expected = Change {
            mode: Some(Mode::Writethrough),
            order: Some(Order::Grouped),
            max_lag_s: Some(0),
            max_dirty: Some(0),
            on_backing_error: Some(OnBackingError::ReadOnly),
            backing_timeout_s: Some(7),
        };
        assert_eq!(read(all), Ok(expected));
        let rows = [
            (serde_json::json!({}), "nothing to change"),
            (serde_json::json!({"mode": null}), "nothing to change"),
            (
                serde_json::json!({"order": "strickt"}),
                "`order`: `strickt` is none of strict, grouped, relaxed",
            ),
            (serde_json::json!({"max_lag_s": 86_401}), "`max_lag_s`: `86401` is not"),
            (serde_json::json!({"max_dirty": "5"}), "`max_dirty`: `5` is not a"),
            (serde_json::json!({"on_backing_error": "panic"}), "`on_backing_error`: `panic` is none of"),
        ];
        for (json, words) in rows {
            let refused = read(json.clone()).unwrap_err();
            assert!(refused.message.contains(words), "{json} gave {}", refused.message);
        }
        assert!(serde_json::from_value::<SetRequest>(serde_json::json!({"odrer": "strict"})).is_err());
    }

    #[test]
    fn a_path_is_one_route_or_none() {
        assert_eq!(names("/v1/volumes/{volume}", "/v1/volumes/web"), Some(vec!["web"]));
        assert_eq!(names("/v1/volumes/{volume}/flush", "/v1/volumes/web/flush"), Some(vec!["web"]));
        for path in ["/v1/volumes", "/v1/volumes/", "/v1/volumes/a/b", "", "/", "/v2/volumes/a"] {
            assert_eq!(names("/v1/volumes/{volume}", path), None, "{path}");
        }
        for (at, route) in ROUTES.iter().enumerate() {
            let same = |other: &Route| (other.method, other.path) == (route.method, route.path);
            assert_eq!(ROUTES.iter().position(same), Some(at), "{} {}", route.method, route.path);
        }
    }
}
