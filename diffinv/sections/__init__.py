"""What a configuration may say, one file a command; `diffinv.config` reads and checks it."""
