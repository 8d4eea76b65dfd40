"""Methods that leave out whole decoder layers."""
