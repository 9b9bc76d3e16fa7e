# runs the first line of /tmp/w/queue, removes it, and so on
export DATA_DIR=/work/shared/data; cd /tmp/w/rob; . /tmp/w/env/bin/activate
while true; do
  line=$(head -1 /tmp/w/queue); [ -z "$line" ] && { sleep 2; continue; }
  sed -i 1d /tmp/w/queue
  echo "== $(date +%T) $line"; eval "$line" || echo "FAILED $line"; echo "-- $(date +%T)"
done
