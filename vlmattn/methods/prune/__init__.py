"""Which visual tokens stay."""
