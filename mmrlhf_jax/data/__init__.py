"""From preference files and pictures to prepared groups. Knows no model and starts no accelerator backend."""
