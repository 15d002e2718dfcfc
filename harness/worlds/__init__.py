"""The only files that know how a run is executed."""
