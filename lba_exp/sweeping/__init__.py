"""Sweeps: what a sweep file says becomes jobs; jobs become processes; what came of them is told and kept. No torch in here."""
