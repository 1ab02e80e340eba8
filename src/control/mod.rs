//! Configuration, command line and lifecycle: the composition root.
