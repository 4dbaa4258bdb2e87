"""The first day with a GPU: driver.py runs the stages of stages.py, each in a process of its own."""
