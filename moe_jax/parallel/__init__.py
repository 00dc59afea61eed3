"""The travel of expert rows between devices."""
