"""The jobs of core. Each holds the run, none knows another, and each can be read and removed alone."""
