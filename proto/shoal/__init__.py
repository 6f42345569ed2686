"""What devices, gateways and the cloud must agree on: messages, topics, delivery and trust."""
