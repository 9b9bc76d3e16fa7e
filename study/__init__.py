"""The study of this project: its plan and how it is done, its two reports, their tables, figures and notebooks."""
