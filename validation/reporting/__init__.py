"""The verdict for people and programs: HTML, JSON, plots, JUnit, terminal."""
