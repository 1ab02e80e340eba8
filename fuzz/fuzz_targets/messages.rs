//! libFuzzer's way into [`pcache_vhost::fuzz::messages`].
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| pcache_vhost::fuzz::messages(bytes));
