"""The first day with a GPU: driver.py runs the stages of stages.py, each in a separate process."""
