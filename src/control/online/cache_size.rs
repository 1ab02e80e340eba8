//! `resize --cache`: a cache grows or shrinks while it is used.

use super::super::api::model::CacheResizeRequest;
use super::args::ResizeArgs;
use super::{Done, follow};

/// `resize`.
pub(super) fn resize(args: &ResizeArgs) -> Done {
    let request = CacheResizeRequest { size: format!("{}B", args.size) };
    let body = serde_json::to_value(&request).expect("a request is JSON");
    follow(&args.online, "POST", &format!("/v1/caches/{}/resize", args.cache), Some(&body))
}
