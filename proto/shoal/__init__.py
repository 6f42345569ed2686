"""What devices, gateways and the cloud must agree on: messages, topics, delivery and trust."""

# Here and not asked of the installed package: that would cost a device 0.7 MB for reading one line.
__version__ = "0.1.0"
