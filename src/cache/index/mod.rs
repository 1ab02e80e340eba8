//! Which extent of a volume is cached where: the sharded index. Pure.
