"""The report: tidy frames, figures drawn from them, one self-contained HTML page."""
