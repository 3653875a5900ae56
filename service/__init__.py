"""The interfaces: the command line, the HTTP API and its page, jobs, and launch files of other engines."""
