"""The commands: one file each, with a function of the file's name that returns a `Result`."""
