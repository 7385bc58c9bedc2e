"""What tests share: tiny models, folders on disk, a hub, servers, a device that is not there. Knows no test."""
