"""Pictures (PNG). They need matplotlib, and no display."""
