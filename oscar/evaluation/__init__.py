"""Measuring the codec: metrics, and the demo's tables and sheets."""
