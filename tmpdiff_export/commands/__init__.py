"""One module per subcommand of `tmpdiff-export`: `add_arguments(parser)` and `run(args) -> int`."""
