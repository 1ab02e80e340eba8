//! libFuzzer's way into [`pcache_vhost::fuzz::settings`].
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| pcache_vhost::fuzz::settings(bytes));
