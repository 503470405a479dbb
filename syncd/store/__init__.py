"""JetStream: buckets, objects, notifications. Only this package imports nats."""
