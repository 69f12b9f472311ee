"""Running a module's code once more without leaving a trace."""
