"""The command line: `dsv4 run`, `explain`, `bisect`, `shadow`, `cache`."""
