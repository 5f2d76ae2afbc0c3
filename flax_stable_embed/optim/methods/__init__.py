"""One file per optimizer, all of the same anatomy: state, rule, engine, `scale_by_*8bit`, `*8bit`."""
