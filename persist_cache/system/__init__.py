"""What the operating system is asked, or told: file systems, volumes, forks, signals, streams."""
