//! `resize`: a volume grows, or with `--cache` a cache grows or shrinks, while it is used.

use super::super::api::model::{CacheResizeRequest, ResizeRequest};
use super::super::value::{self, Name};
use super::args::ResizeArgs;
use super::{Done, OnlineError, follow};

/// `resize`.
pub(super) fn resize(args: &ResizeArgs) -> Done {
    let words: Vec<&str> = args.what.iter().map(String::as_str).collect();
    let (path, body) = match (&args.cache, words.as_slice()) {
        (Some(cache), [size]) => {
            let request = CacheResizeRequest { size: format!("{}B", value::cache_size(size)?) };
            (format!("/v1/caches/{cache}/resize"), serde_json::to_value(&request))
        }
        (None, [volume, size @ ..]) => {
            let volume: Name = volume.parse()?;
            let size = size.first().map(|size| value::disk_size(size)).transpose()?;
            let request = ResizeRequest { size: size.map(|size| format!("{size}B")) };
            (format!("/v1/volumes/{volume}/resize"), serde_json::to_value(&request))
        }
        _ => return Err(OnlineError::Meaningless("resize takes VOLUME [SIZE], or --cache CACHE SIZE")),
    };
    let body = body.expect("a request is JSON");
    follow(&args.online, "POST", &path, Some(&body))
}
