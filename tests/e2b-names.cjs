// No resolver knows the names of our server for E2B's SDK: they are this host.
const dns = require('node:dns')
const lookup = dns.lookup
dns.lookup = (name, options, callback) => {
  if (typeof options === 'function') [options, callback] = [{}, options]
  return lookup(name.endsWith('.e2b.test') ? '127.0.0.1' : name, options, callback)
}
