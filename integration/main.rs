//! Boots real guests against the server and holds it to what they see.
//!
//! Each scenario is a test whose name is a claim. `README.md` beside this file has the table, what is
//! needed, and how to run one of them.

mod bare;
mod cpio;
mod guest;
mod monitor;
mod prepare;
mod server;

#[path = "../tests/client/mod.rs"]
mod client;
#[path = "../cloud-hypervisor/launch.rs"]
mod cloud_hypervisor;
#[path = "../qemu/launch.rs"]
mod qemu;

mod scenarios {
    //! What happens to the disk, told from inside the guest.

    mod bare;
    mod demo;
    mod guide;
    mod harness;
    mod hot;
    mod inside;
    mod survival;
    mod traffic;
}
