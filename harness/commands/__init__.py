"""Commands of the command line, one file each; what is slow to import is imported on use."""
