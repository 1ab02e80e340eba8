//! Requests in, used descriptors out: the vhost-user-blk front end.
