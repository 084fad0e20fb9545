"""Compare methods: plans (methods x settings x seeds), the runner, paired statistics and the report."""
