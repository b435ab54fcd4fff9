"""The command line of every protocol, one file each, see `fastdino.evaluation.command`."""
