//! `pcache-vhost`: parse, configure, run, exit.

fn main() {}
