"""What the operating system has to be asked, or told: file systems, volumes, forks, signals."""
