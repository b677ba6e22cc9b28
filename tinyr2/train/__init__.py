"""The loops: what turns batches into weights, keeps the state safe and watches the run's health."""
