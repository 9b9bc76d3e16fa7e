"""This study: its plan and how it is done, its two reports, and their tables, figures and notebooks."""
