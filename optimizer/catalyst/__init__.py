"""Catalyst from Python: the bridge to the driver's JVM, and how rules run."""
