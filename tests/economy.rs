//! What the server costs beside the requests themselves: kicks and interrupts, and its idle processor.
//!
//! Counts, and processor time of the server alone: a busy machine changes neither.

mod client;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use client::{Client, ClientOptions, Daemon, Layout, Notify, Request, Workspace, feature};

const MIB: u64 = 1 << 20;
/// Requests submitted at once.
const BATCH: u16 = 32;

/// How queues wait, and on which threads.
const WAYS: [&[&str]; 5] = [
    &["--poll=off"],
    &["--poll-us=32"],
    &["--poll=fixed", "--poll-us=500"],
    &["--poll=fixed", "--poll-us=500", "--poll-cpu-percent=5"],
    &["--queue-threads=1"],
];

/// Kicks and calls per request of a driver that submits [`BATCH`] at a time and sleeps between.
fn per_request(more: &[&str], packed: bool) -> (f64, f64) {
    const ROUNDS: u64 = 100;
    let workspace = Workspace::new();
    let daemon = Daemon::cached(&workspace, "64MiB", 64 * MIB, 1, more);
    let options = ClientOptions { packed, notify: Notify::Poll, ..ClientOptions::default() };
    let mut client = Client::connect(daemon.socket(), options);
    assert_ne!(client.features & feature::EVENT_IDX, 0);
    let (kicks, _) = (client.queues[0].kicks, client.queues[0].take_call());
    client.queues[0].calls = 0;
    for round in 0..ROUNDS {
        for at in 0..u64::from(BATCH) {
            let request = Request::read(8 * (round * 7 + at), 4096);
            let layout = Layout { indirect: true, ..Layout::plain(&request) };
            assert!(client.submit(0, at, &request, &layout));
        }
        client.queues[0].arm_after(BATCH);
        client.queues[0].publish();
        let mut done = Vec::new();
        while client.outstanding() > 0 {
            std::thread::sleep(Duration::from_millis(1));
            client.collect(&mut done);
        }
        assert_eq!(done.len(), BATCH.into());
        // The call is written after the last of them is shown.
        std::thread::sleep(Duration::from_millis(1));
        client.queues[0].take_call();
    }
    let requests = (ROUNDS * u64::from(BATCH)) as f64;
    let (kicks, calls) = (client.queues[0].kicks - kicks, client.queues[0].calls);
    (kicks as f64 / requests, calls as f64 / requests)
}

#[test]
fn a_driver_that_submits_32_at_a_time_kicks_and_is_called_less_than_once_in_ten_requests() {
    for packed in [false, true] {
        for more in WAYS {
            let (kicks, calls) = per_request(more, packed);
            eprintln!("packed={packed} {more:?} kicks/request={kicks:.3} calls/request={calls:.3}");
            assert!(kicks < 0.1 && calls < 0.1, "{kicks} kicks, {calls} calls per request");
            // Neither may be saved by never telling.
            assert!(calls > 0.0, "a driver that asked to be called never was");
        }
    }
}

/// Processor time that a server with eight idle volumes, each with a guest, takes in `time`, as a part of
/// one core.
fn idle(time: Duration) -> f64 {
    const VOLUMES: usize = 8;
    let workspace = Workspace::new();
    let sockets: Vec<PathBuf> = (0..VOLUMES).map(|at| workspace.path(&format!("{at}.sock"))).collect();
    let mut config = format!(
        "[[cache]]\nname = \"c\"\npath = {:?}\nsize = \"256MiB\"\n",
        workspace.path("cache.img").display().to_string()
    );
    for (at, socket) in sockets.iter().enumerate() {
        let disk = workspace.disk(&format!("{at}.img"), 64 * MIB);
        config += &format!(
            "[[volume]]\nname = \"v{at}\"\nsocket = {:?}\nbacking = {:?}\nqueues = 2\n",
            socket.display().to_string(),
            disk.display().to_string()
        );
    }
    let daemon = Daemon::configured(&workspace, &config, &sockets[0]);
    let options = ClientOptions { queues: 2, mem_size: 4 << 20, ..ClientOptions::default() };
    let mut clients: Vec<Client> =
        sockets.iter().map(|socket| Client::connect(socket, options.clone())).collect();
    for client in &mut clients {
        for queue in 0..2 {
            client.assert_works(queue, 1);
        }
    }
    // What was written goes to the disks, and queues learn that polling does not pay.
    std::thread::sleep(Duration::from_secs(8));
    let before = daemon.cpu_time();
    std::thread::sleep(time);
    let share = (daemon.cpu_time() - before).as_secs_f64() / time.as_secs_f64();
    eprintln!("{VOLUMES} idle volumes over {time:?}: {:.3} % of a core", share * 100.0);
    share
}

#[test]
fn eight_idle_volumes_take_less_than_half_a_percent_of_a_core() {
    assert!(idle(Duration::from_secs(5)) < 0.005);
}

#[test]
#[ignore = "takes over a minute: cargo test --test economy -- --ignored --nocapture"]
fn eight_idle_volumes_take_less_than_half_a_percent_of_a_core_over_a_minute() {
    assert!(idle(Duration::from_secs(60)) < 0.005);
}

#[test]
fn a_queue_that_polls_keeps_to_its_part_of_a_processor() {
    const TIME: Duration = Duration::from_secs(2);
    let share = |more: &[&str]| {
        let workspace = Workspace::new();
        let daemon = Daemon::cached(&workspace, "64MiB", 64 * MIB, 1, more);
        let mut client = Client::connect(daemon.socket(), ClientOptions::default());
        let (begun, before) = (Instant::now(), daemon.cpu_time());
        while begun.elapsed() < TIME {
            client.assert_works(0, 1);
            std::thread::sleep(Duration::from_millis(2));
        }
        let share = (daemon.cpu_time() - before).as_secs_f64() / begun.elapsed().as_secs_f64();
        eprintln!("{more:?}: {:.1} % of a processor", share * 100.0);
        share
    };
    // What the requests themselves take.
    let least = share(&["--poll=off"]);
    let always = share(&["--poll=fixed", "--poll-us=10000"]);
    let bounded = share(&["--poll=fixed", "--poll-us=10000", "--poll-cpu-percent=5"]);
    assert!(bounded < least + 0.07, "5 % were allowed: {bounded} with, {least} without");
    assert!(always > bounded, "a queue that may poll always polls more: {always}, {bounded}");
}

/// The names of a server's threads.
fn threads(daemon: &Daemon) -> Vec<String> {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", daemon.pid())).expect("the server's threads");
    let names = tasks.flatten().filter_map(|task| std::fs::read_to_string(task.path().join("comm")).ok());
    names.map(|name| name.trim().to_owned()).collect()
}

#[test]
fn one_thread_serves_all_queues_of_several_volumes_also_while_some_come_and_go() {
    let workspace = Workspace::new();
    let sockets: Vec<PathBuf> = (0..3).map(|at| workspace.path(&format!("{at}.sock"))).collect();
    let mut config = format!(
        "[[cache]]\nname = \"c\"\npath = {:?}\nsize = \"128MiB\"\n",
        workspace.path("cache.img").display().to_string()
    );
    for (at, socket) in sockets.iter().enumerate() {
        let disk = workspace.disk(&format!("{at}.img"), 64 * MIB);
        config += &format!(
            "[[volume]]\nname = \"v{at}\"\nsocket = {:?}\nbacking = {:?}\nqueues = 4\n\
             thread_group = \"shared\"\ncpus = \"0\"\n",
            socket.display().to_string(),
            disk.display().to_string()
        );
    }
    let mut daemon = Daemon::configured(&workspace, &config, &sockets[0]);
    let options = ClientOptions { queues: 4, mem_size: 8 << 20, ..ClientOptions::default() };
    let connect = |at: usize| Client::connect(&sockets[at], options.clone());
    let mut clients: Vec<Client> = (0..3).map(connect).collect();
    for round in 1..=20u8 {
        for client in &mut clients {
            for queue in 0..4 {
                client.assert_works(queue, round);
            }
        }
        // One front end goes in the middle of a request, and another comes.
        let leaves = usize::from(round) % 3;
        let read = Request::read(0, 4096);
        assert!(clients[leaves].submit(3, 1, &read, &Layout::plain(&read)));
        clients[leaves].queues[3].publish();
        drop(clients.remove(leaves));
        clients.insert(leaves, connect(leaves));
    }
    let names = threads(&daemon);
    let count = |part: &str| names.iter().filter(|name| name.contains(part)).count();
    assert_eq!((count("shared/t"), count("/q")), (1, 0), "{names:?}");
    daemon.stop();
}
