"""What nothing may leave behind: runs of several threads at a time, interrupts, exceptions at any point."""
