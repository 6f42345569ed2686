-- wrk: POST each payload of a file in turn, and say what came of it as one line of JSON.
--   wrk -t1 -c64 -d5s --latency -s rotate.lua http://127.0.0.1:8000/inference -- FILE

local requests, at = {}, 0

local function read_u32(file)
  local a, b, c, d = file:read(4):byte(1, 4)
  return a + b * 256 + c * 65536 + d * 16777216
end

function init(args)
  local file = assert(io.open(args[1], "rb"))
  local headers = { ["Content-Type"] = "application/x-protobuf" }
  for index = 1, read_u32(file) do
    local body = file:read(read_u32(file))
    requests[index] = wrk.format("POST", nil, headers, body)
  end
  file:close()
end

function request()
  at = at % #requests + 1
  return requests[at]
end

function done(summary, latency, _)
  local errors = summary.errors
  io.write(string.format(
    '{"requests": %d, "seconds": %.4f, "rps": %.1f, "p50_us": %.1f, "p99_us": %.1f, "p999_us": %.1f, "errors": %d}\n',
    summary.requests, summary.duration / 1e6, summary.requests / (summary.duration / 1e6),
    latency:percentile(50), latency:percentile(99), latency:percentile(99.9),
    errors.connect + errors.read + errors.write + errors.status + errors.timeout))
end
