"""Entry points for `ray job submit`: each runs the `ctc-ray` command of its name on the cluster it is submitted to."""
